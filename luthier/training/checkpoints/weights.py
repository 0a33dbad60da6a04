"""Loading the weights of a checkpoint into the model of a run, and what is wrong where they do not fit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import OutputError, RunFailed
from luthier.core.log import quiet
from luthier.model.heads.score_head import VALUE_HEAD

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def checkpoint_mismatch(checkpoint: str) -> Iterator[None]:
    """Wraps loading a checkpoint into a run's model. Raises `OutputError` if it was saved by another kind of run."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as fault:
        lines = [line.strip() for line in str(fault).splitlines()]
        reason = next((line for line in lines if "mismatch" in line), lines[0] if lines else type(fault).__name__)
        raise OutputError(
            f"{checkpoint}: this checkpoint does not match the run ({reason}) -> use the model, finetuning_type,"
            " optimizer and adapter keys that it was trained with, or choose another output_dir to start from scratch"
        ) from fault


@contextmanager
def taking_saved_names(model: "nn.Module", folder: Path) -> Iterator[None]:
    """While open, `load_state_dict` takes weights by the names in the files of `folder`.

    Those of models that see are not the names of their modules: transformers saves under the names of the hub, and only
    its `from_pretrained` reads them. All numbers of 16 and 32 bits are read as they are.
    """
    import torch
    from transformers import PreTrainedModel

    load, names = model.load_state_dict, set(model.state_dict())

    def load_saved(state_dict: dict[str, Any], *args: Any, **options: Any) -> Any:
        if not set(state_dict) <= names and isinstance(model, PreTrainedModel):
            kind: Any = type(model)
            with quiet("transformers"):
                saved, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            state_dict = {key: value for key, value in saved.state_dict().items() if key not in found["missing_keys"]}
        return load(state_dict, *args, **options)

    vars(model)["load_state_dict"] = load_saved
    try:
        yield
    finally:
        del vars(model)["load_state_dict"]


def check_filled(model: "nn.Module", missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raises `RunFailed` if a loaded checkpoint did not fill all weights of `model`, or has weights of another model.

    Missing names are fine for tied weights, which are saved once, for the value head of ppo, which has its own file,
    and for weights that the model computes and never saves (sinusoidal positions).
    """
    tensors, never_saved = model.state_dict(), set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    absent = {name for name in missing if not name.startswith(f"{VALUE_HEAD}.") and name not in never_saved}
    filled = {tensor.data_ptr() for name, tensor in tensors.items() if name not in absent}
    absent = {name for name in absent if name not in tensors or tensors[name].data_ptr() not in filled}
    faults = {"has no weight": sorted(absent), "has an unexpected weight": sorted(unexpected)}
    for fault, names in faults.items():
        if names:
            raise RunFailed(
                f"the checkpoint {fault} {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}"
                " -> use the model that it was trained with, or choose another output_dir to start from scratch"
            )
