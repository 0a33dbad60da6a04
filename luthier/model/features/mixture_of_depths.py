"""Mixture of depths: every second block lets only a share of the tokens of each text through.

Raposo et al. 2024, https://arxiv.org/abs/2404.02258. Letters: B rows, T tokens of a row, D hidden size, K tokens that a
block computes, n tokens of one text, f what a block adds to its input.

    score    r_i = 1 + w . x_i
    output   x_i + r_i f(X)_i   for the ceil(CAPACITY n) tokens of a text with the highest scores, X being these alone
             x_i                for the others                                                              (eq. 1)

The 1 changes no ranking. With it the tokens that pass get, at first, what the dense block would have given them, so a
trained model can be converted.

To choose the best of a text looks ahead, which is not possible while an answer is written. The paper trains a second
network to foresee the choice, or a loss that pulls the scores of the chosen above a fixed number. Here, each block
keeps a running mean of the score that divided the chosen from the others while it trained, and outside training a token
passes if its own score is above that. This adds no loss, so it goes with every way to train, and sees the past only.

The chosen tokens of all texts of a batch are concatenated in one row, (1, K, D), and attention stays within each text
(`luthier.model.attention`). So concatenated and padded rows take the same path, and the gradient checkpoint of a block
keeps K tokens. Keys and values of a block belong to its chosen tokens only: there is no cache.
"""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from luthier.config.keys.sharding import shards_weights
from luthier.config.rules.engine import Rule, Rules, When, in_training, is_given, is_set
from luthier.config.runs import TrainRun
from luthier.core.errors import ModelError
from luthier.core.kinds import ADAPTERS, STAGES
from luthier.model.attention import isolate_samples, isolates_samples, reason_to_pad
from luthier.model.classes import ROUTED_KEY, ROUTED_MODEL_TYPE, is_routed, model_class
from luthier.model.features import Feature, Purpose
from luthier.model.modules import layer_list
from luthier.model.trial import are_close, trying

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureOfDepthsConfig:
    mixture_of_depths: Literal["convert", "load"] | None = None
    """Every second block skips tokens: convert a model, or load a converted one (https://arxiv.org/abs/2404.02258)."""


def _converts(run: Any) -> bool:
    return run.features.mixture_of_depths.mixture_of_depths == "convert"


_with_routers = When(is_given("features.mixture_of_depths", "mixture_of_depths"))

RULES = Rules(
    (
        Rule(
            ("mixture_of_depths", "do_train"),
            "the routers of a converted model are untrained, so only training converts",
            "set mixture_of_depths: load and name a model that was trained so",
            lambda run: _converts(run) and not (isinstance(run, TrainRun) and run.trains),
        ),
        *in_training(
            Rule(
                ("mixture_of_depths", "finetuning_type"),
                "the new routers must be trained together with the blocks, and an adapter holds no routers",
                "set finetuning_type: full; a model that was trained so takes lora or freeze with mixture_of_depths:"
                " load",
                lambda run: _converts(run) and not ADAPTERS.get(run.finetuning_type).trains_everything,
            ),
            _with_routers.refuses(
                ("mixture_of_depths", "stage"),
                "while training, tokens are chosen among those of the whole text, which is defined for the loss of pt"
                " and sft only; other stages compare the model with one that is not training",
                "set stage: pt or sft",
                lambda run: not STAGES.get(run.stage).supports_skipped_tokens,
            ),
            _with_routers.refuses(
                ("mixture_of_depths", "quantization_bit"),
                "blocks that skip tokens must be trained, and quantized weights cannot be",
                "leave quantization_bit out",
                is_given("quantization", "quantization_bit"),
            ),
            _with_routers.refuses(
                ("mixture_of_depths", "shift_attn"),
                "counts the tokens that pass a router, and shift_attn counts those of the text",
                "leave one of the two out",
                is_set("features.shifted_attention", "shift_attn"),
            ),
            _with_routers.refuses(
                ("mixture_of_depths", "flash_attn"),
                "needs attention that does not attend across samples, and plain attention does",
                "leave flash_attn: disabled out",
                lambda run: run.model.flash_attn == "disabled",
            ),
            _with_routers.refuses(
                ("mixture_of_depths", "moe_aux_loss_coef"),
                "the balance loss counts every token in every block",
                "leave moe_aux_loss_coef out",
                is_given("features.router_balance", "moe_aux_loss_coef"),
            ),
            _with_routers.refuses(
                ("mixture_of_depths", "fsdp", "deepspeed"),
                "changes the blocks of a whole model, and FSDP and ZeRO-3 shard its weights",
                "leave fsdp and ZeRO-3 out",
                shards_weights,
            ),
        ),
    )
)


CAPACITY = 0.125
"""Share of the tokens that a routed block computes; the best of the paper, section 4.1."""


def convert(model: "PreTrainedModel", capacity: float = CAPACITY) -> None:
    """Give every second block of `model` a router. Raises `ModelError` for a model that this cannot be done with."""
    import torch

    if is_routed(model.config):
        raise _cannot(model, "is a mixture of depths already", "set mixture_of_depths: load")
    lack = _reason_against(model)
    if lack:
        raise _cannot(model, lack, "leave mixture_of_depths out, or take a plain decoder of text (Llama, Qwen, ...)")
    has_numbers = model.device.type != "meta"  # the model of a plan has none
    dense = _probe(model) if has_numbers else None
    setattr(model.config, ROUTED_KEY, {"model_type": model.config.model_type, "capacity": capacity})
    add_routers(model)
    routers: list[Any] = [layer.depth_router for layer in layer_list(model)[1][1::2]]
    with torch.no_grad():
        for router in routers:
            router.weight.zero_()
    if dense is not None and not are_close(model, _probe(model), dense):
        raise _cannot(model, "computes something else when its tokens are concatenated in one row", "leave it out")
    for router in routers:
        router.start()


def add_routers(model: "PreTrainedModel") -> None:
    """Fresh routers for a model whose config says that it has them."""
    from luthier.model.kernels.routed_blocks import put_routers, routed_class

    kind: Any = type(model)
    model.__class__ = routed_class(kind)
    put_routers(model)
    prepare(model)


def routed_model_class(config: "PreTrainedConfig") -> Any:
    """The class that loads the mixture of depths which `config` describes."""
    from luthier.model.kernels.routed_blocks import routed_class

    return routed_class(model_class(config))


def prepare(model: "PreTrainedModel") -> None:
    """What a loaded mixture of depths needs to compute: attention within each text, and no cache."""
    isolate_samples(model)
    model.config.use_cache = False
    if model.can_generate():
        model.generation_config.use_cache = False


def register() -> None:
    """Let transformers, in this process, read the config of a mixture of depths as that of its blocks."""
    from transformers import AutoConfig

    AutoConfig.register(ROUTED_MODEL_TYPE, _config_reader(), exist_ok=True)


def _reason_against(model: "PreTrainedModel") -> str:
    """Why a model cannot be converted, or the empty string."""
    config = model.config
    if config.is_encoder_decoder or config.sub_configs:
        return "is not a plain decoder of text"
    layer_types = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in layer_types or (not layer_types and getattr(config, "sliding_window", None)):
        return "has sliding windows, which would count the tokens that pass and not those of the text"
    reason = reason_to_pad(model, sees=False) if model.device.type == "meta" else isolates_samples(model)
    if reason is not None:
        return f"attends across texts that are concatenated: {reason}"
    layers = layer_list(model)[1]
    names = list(inspect.signature(type(layers[0]).forward).parameters)
    return "" if len(layers) > 1 and names[1] == "hidden_states" else "has no second block of the usual form"


def _probe(model: "PreTrainedModel") -> "Tensor":
    """(12, V) logits of two texts of 7 and 5 tokens in padded rows."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (2, 7), generator=generator).to(model.device)
    real = torch.tensor([[1] * 7, [1] * 5 + [0] * 2], device=model.device)
    with trying(model):
        logits: Tensor = model(input_ids=ids, attention_mask=real, use_cache=False).logits[real.bool()]
    return logits.float()


def _cannot(model: "PreTrainedModel", reason: str, remedy: str) -> ModelError:
    return ModelError(f"mixture_of_depths: {type(model).__name__} {reason} -> {remedy}")


@cache
def _config_reader() -> "type[PreTrainedConfig]":
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    class DepthsConfig(PreTrainedConfig):
        model_type = ROUTED_MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            kind = config_dict[ROUTED_KEY]["model_type"]
            return CONFIG_MAPPING[kind].from_dict({**config_dict, "model_type": kind}, **kwargs)

    return DepthsConfig


def on_config(keys: MixtureOfDepthsConfig, config: "PreTrainedConfig", purpose: Purpose) -> None:
    """Raises `ModelError` if a mixture of depths is to be loaded and the model is none."""
    if keys.mixture_of_depths == "load" and not is_routed(config):
        raise ModelError(
            f"mixture_of_depths: load: {purpose.name} is a dense model -> set mixture_of_depths: convert and"
            " train it first, or leave the key out"
        )


def on_model(keys: MixtureOfDepthsConfig, model: "PreTrainedModel", purpose: Purpose) -> None:
    if keys.mixture_of_depths == "convert" and purpose.training is not None:
        convert(model)


FEATURE = Feature(
    name="mixture_of_depths", config=MixtureOfDepthsConfig, check=RULES, on_config=on_config, on_model=on_model
)
