"""Which modules of a model compute with the kernels of this folder: linear layers, RMSNorms, gated MLPs and rotations.

What a module computes is not looked up in a list of classes. Its `forward` is tried on a few numbers and has to give
what the formula of the kernel gives; every other module stays as it is. So it makes no difference whether the code
comes from transformers or with the model.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from luthier.model.kernels.lora_layers import computed_together, fuse_lora, has_hooks, project, project_gated
from luthier.model.kernels.plain_linear import fuse_plain
from luthier.model.kernels.rms_norm import FORMS, Form, RmsNorm, rms_norm
from luthier.model.kernels.rotary import Rotating, rotation_of
from luthier.model.kernels.swiglu import SILU, Activation, activation_of

QUERY_PARTS = ("q_proj", "k_proj", "v_proj")
GATED_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
INTERNAL = frozenset(vars(nn.Module()))
"""What every module holds."""
PLAIN = (bool, int, float, str, type(None))
NUM_ROWS, WIDTH = 48, 16
"""Of the numbers that a module is tried on."""
DIFFERENT_SHARE = 50
"""One of so many numbers may round differently in 16 bits, since a sum was formed in another order."""
FAULTS = (AttributeError, TypeError, ValueError, RuntimeError, LookupError, NotImplementedError)
"""What code raises that needs more than it gets in a trial."""


Trials = dict[Hashable, Any]
"""Module without its weights -> what was found, so that the layers of a model are tried once. Holds ids of what the
modules hold, so it is for the modules of one model."""


def fuse(model: nn.Module) -> None:
    """Let `model`, whose adapters are in place, compute with the kernels from now on."""
    trials: Trials = {}
    with torch.random.fork_rng(devices=()):  # dropout in a trial
        fuse_lora(model, groups_of_one_input(model, trials))
        for module in model.modules():
            if "forward" not in vars(module):
                _fuse_module(module, trials)
        fuse_plain(model)


def _fuse_module(module: nn.Module, trials: Trials) -> None:
    if (form := norm_form(module, trials)) is not None:
        module.forward = partial(_normed, module, form)
    elif (activation := gated_activation(module, trials)) is not None:
        module.forward = partial(_gated_mlp, module, activation)
    else:
        rotation, projections = _rotation(type(module), trials), _parts_of_one_input(module, trials)
        if rotation is not None or projections:
            module.forward = partial(_attend, module, rotation, projections)


def groups_of_one_input(model: nn.Module, trials: Trials) -> Iterator[Sequence[nn.Module]]:
    """The parts of modules that are given the same input. `model`: before or after `fuse`."""
    for module in model.modules():
        own = vars(module).get("forward")
        if isinstance(own, partial) and own.func is _attend:
            parts = own.args[2]
        elif (isinstance(own, partial) and own.func is _gated_mlp) or gated_activation(module, trials) is not None:
            parts = [getattr(module, name) for name in GATED_PARTS[:2]]
        else:
            parts = _parts_of_one_input(module, trials)
        if parts:
            yield parts


def _parts_of_one_input(module: nn.Module, trials: Trials) -> list[nn.Module]:
    """The projections to queries, keys and values, if the module gives its own input to each of them."""
    parts = [module._modules.get(name) for name in QUERY_PARTS]
    if not all(isinstance(getattr(part, "out_features", None), int) for part in parts):
        return []
    return parts if tried(_gives_input_to_all, module, trials) else []  # type: ignore[return-value]


class _AllSeenError(LookupError):
    pass


def _gives_input_to_all(module: nn.Module) -> bool:
    seen: list[Tensor] = []

    def stand_in(layer: Any) -> Callable[[Tensor], Tensor]:
        def apply(x: Tensor) -> Tensor:
            seen.append(x)
            if len(seen) == len(QUERY_PARTS):
                raise _AllSeenError
            return x.new_zeros(*x.shape[:-1], layer.out_features)

        return apply

    probe = probe_of(module)
    parts: dict[str, Any] = dict(module._modules)
    for name, part in parts.items():
        vars(probe)[name] = stand_in(part) if name in QUERY_PARTS else nn.Identity()
    with torch.device("cpu"):
        x, places = (
            torch.zeros(1, 2, parts[QUERY_PARTS[0]].in_features),
            torch.zeros(1, 2, getattr(module, "head_dim", 0)),
        )
    try:
        probe.forward(hidden_states=x, position_embeddings=(places, places), attention_mask=None)
    except _AllSeenError:
        return all(one is x for one in seen)
    except FAULTS:
        pass
    return False


def _rotation(kind: type, trials: Trials) -> Rotating | None:
    if (rotation_of, kind) not in trials:
        trials[rotation_of, kind] = rotation_of(kind)
    rotation: Rotating | None = trials[rotation_of, kind]
    return rotation


def _attend(module: Any, rotation: Rotating | None, projections: Sequence[nn.Module], *args: Any, **given: Any) -> Any:
    """The forward of an attention layer, which finds its rotation in the Python module that it is in. Other models
    keep the rotation they have; a compiler makes kernels of its own."""
    forward = type(module).forward
    if torch.compiler.is_compiling():
        return forward(module, *args, **given)
    rotating = contextlib.nullcontext() if rotation is None else rotation.in_place()
    with rotating, computed_together(projections, args[0] if args else given.get("hidden_states")):
        return forward(module, *args, **given)


def _normed(module: Any, form: Form, *args: Any, **given: Any) -> Any:
    if len(args) != 1 or given:
        return type(module).forward(module, *args, **given)
    return rms_norm(args[0], module.weight, eps_of(module), form)  # type: ignore[arg-type]


def _gated_mlp(module: Any, activation: Activation, *args: Any, **given: Any) -> Any:
    return _gated_output(module, activation, args, given, is_read=True)


def _gated_mlp_unread(
    module: Any, activation: Activation, *args: Any, keeps_the_same: bool = False, **given: Any
) -> Any:
    """As `_gated_mlp`, with the right gradients and any numbers."""
    return _gated_output(module, activation, args, given, is_read=False, keeps_the_same=keeps_the_same)


def _gated_output(
    module: Any, activation: Activation, args: Any, given: Any, *, is_read: bool, keeps_the_same: bool = False
) -> Any:
    if len(args) != 1 or given:
        return type(module).forward(module, *args, **given)
    gate, up = project((module.gate_proj, module.up_proj), args[0])
    if gate.dtype != up.dtype:
        return module.down_proj(activation.apply(gate) * up)
    return project_gated(module.down_proj, gate, up, activation, is_read=is_read, keeps_the_same=keeps_the_same)


@contextlib.contextmanager
def last_product_left_out(mlp: nn.Module, *, keeps_the_same: bool = False) -> Iterator[None]:
    """A context in which a gated MLP that `fuse` has changed leaves out its last product where it can: the gradients
    are right, the numbers that it puts out are not. `keeps_the_same`: only where it keeps the same tensors for the
    backward pass as with the product."""
    own = vars(mlp).get("forward")
    if has_hooks(mlp) or not (isinstance(own, partial) and own.func is _gated_mlp):
        yield
        return
    mlp.forward = partial(_gated_mlp_unread, *own.args, keeps_the_same=keeps_the_same)
    try:
        yield
    finally:
        mlp.forward = own


def form_in_use(module: nn.Module, trials: Trials) -> Form | None:
    """`norm_form`, also of an RMSNorm that `fuse` has changed."""
    own = vars(module).get("forward")
    if own is None:
        return norm_form(module, trials)
    return own.args[1] if isinstance(own, partial) and own.func is _normed else None


def activation_in_use(module: nn.Module, trials: Trials) -> Activation | None:
    """`gated_activation`, also of an MLP that `fuse` has changed."""
    own = vars(module).get("forward")
    if own is None:
        return gated_activation(module, trials)
    return own.args[1] if isinstance(own, partial) and own.func is _gated_mlp else None


def attends_as_before(module: nn.Module) -> bool:
    """Whether `fuse` has changed this attention, which computes the same as before."""
    own = vars(module).get("forward")
    return isinstance(own, partial) and own.func is _attend


def norm_form(module: nn.Module, trials: Trials | None = None) -> Form | None:
    """How this RMSNorm computes; None if it is none, or computes in another way."""
    parameters = dict(module.named_parameters(recurse=False))
    is_alone = not module._modules and not module._buffers and set(parameters) == {"weight"}
    if not is_alone or parameters["weight"].ndim != 1 or eps_of(module) is None:
        return None
    return tried(_form_found, module, trials)


def tried(trial: Callable[[nn.Module], Any], module: nn.Module, trials: Trials | None) -> Any:
    """What `trial` finds. It depends on what `probe_of` copies alone."""
    if trials is None:
        return trial(module)
    settings = ((name, value) for name, value in sorted(vars(module).items()) if name not in INTERNAL)
    known = tuple((name, type(value), value if isinstance(value, PLAIN) else id(value)) for name, value in settings)
    key = (trial, type(module), known)
    if key not in trials:
        trials[key] = trial(module)
    return trials[key]


def _form_found(module: nn.Module) -> Form | None:
    return next((form for form in FORMS if _computes(module, form)), None)


def eps_of(module: nn.Module) -> float | None:
    """The only float that the module holds, whatever its name."""
    found = [value for value in vars(module).values() if isinstance(value, float)]
    return found[0] if len(found) == 1 else None


def _computes(module: nn.Module, form: Form) -> bool:
    """In float32, in bfloat16, and in bfloat16 with a weight in float32."""
    half, full = torch.bfloat16, torch.float32
    for x_dtype, weight_dtype in ((full, full), (half, half), (half, full)):
        x, weight = _numbers(NUM_ROWS, 1).to(x_dtype), _numbers(1, 2)[0].to(weight_dtype)
        probe = probe_of(module)
        probe.weight = nn.Parameter(weight, requires_grad=False)
        try:
            found = probe.forward(x)
            expected = RmsNorm.apply(x, weight, eps_of(module), form)
        except FAULTS:
            return False
        if not isinstance(found, Tensor) or found.dtype != expected.dtype or found.shape != expected.shape:
            return False
        tolerance = 2e-6 * expected.abs() if expected.dtype == full else torch.zeros_like(expected)
        different = ((found - expected).abs() > tolerance).sum() * DIFFERENT_SHARE // expected.numel()
        if not torch.equal(different, torch.zeros_like(different)):
            return False
    return True


def gated_activation(module: nn.Module, trials: Trials | None = None) -> Activation | None:
    """act of an MLP that computes down_proj(act(gate_proj(x)) * up_proj(x)) and no more; None of any other module."""
    parts = [module._modules.get(name) for name in GATED_PARTS]
    activation = None if None in parts else activation_of(parts[-1])  # type: ignore[arg-type]
    return activation if activation is not None and tried(_is_gated, module, trials) else None


def _is_gated(module: nn.Module) -> bool:
    x, gate, up, down = (_numbers(WIDTH, seed) for seed in range(3, 7))
    probe = probe_of(module)
    probe.gate_proj, probe.up_proj, probe.down_proj = gate.matmul, up.matmul, down.matmul
    probe.act_fn = SILU.apply
    try:
        found = probe.forward(x)
    except FAULTS:
        return False
    expected = down @ (SILU.apply(gate @ x) * (up @ x))
    return isinstance(found, Tensor) and torch.equal(found, expected)


def probe_of(module: nn.Module) -> Any:
    """A module of the same class and settings, without weights and parts."""
    kind: Any = type(module)
    probe = kind.__new__(kind)
    nn.Module.__init__(probe)
    vars(probe).update({name: value for name, value in vars(module).items() if name not in INTERNAL})
    return probe


def _numbers(num_rows: int, seed: int) -> Tensor:
    """(num_rows, WIDTH) between -1 and 1, in the last rows far smaller. No random number is drawn for it."""
    with torch.device("cpu"):
        places = torch.arange(num_rows * WIDTH, dtype=torch.float32).view(num_rows, WIDTH)
        scale = 10.0 ** -torch.linspace(0, 4 if num_rows > WIDTH else 0, num_rows)
    return torch.sin(places * places + seed) * scale[:, None]
