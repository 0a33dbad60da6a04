"""The models that a run names beside the policy and that are not trained: reference, teacher, reward model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from luthier.config.keys.quantization import QuantizationConfig
from luthier.core.errors import ModelError
from luthier.core.machine import detect
from luthier.model.adapters._merge import check_given, given_adapters
from luthier.model.adapters._series import given_as
from luthier.model.dtype import inference_dtype
from luthier.model.embeddings import num_rows
from luthier.model.files.sources import model_source
from luthier.model.loading.base import dtype_of, takes_fast_path
from luthier.model.loading.merged import load_merged
from luthier.model.quantization._layers import plan
from luthier.model.tokenizer import FittedTokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from luthier.config.runs import TrainRun


def load_frozen_model(
    run: "TrainRun",
    key: str,
    source: str,
    adapters: tuple[str, ...],
    fitted: FittedTokenizer,
    *,
    line: Callable[[str], str] | None = None,
    bits: int | None = None,
    scores: bool = False,
) -> "PreTrainedModel":
    """The model `source`, named by `key`, with `adapters` merged, in evaluation mode and without gradients.

    `line`: how a run file gives it other adapters, if not as `{key}_adapters`. `bits`: of its linear layers, by
    bitsandbytes. `scores`: it is a reward model. Raises `ModelError` if it reads
    token ids in another way than the policy.
    """
    keys = replace(run.model, model_name_or_path=source, adapter_name_or_path=adapters)
    located = model_source(keys)
    with _under(key):
        check_given(given_adapters(keys), located, line or given_as(f"{key}_adapters"))
        own = load_tokenizer(located, use_fast=keys.use_fast_tokenizer)
    difference = first_difference(fitted.tokenizer, own, but=fitted.added_tokens)
    if difference:
        raise ModelError(
            f"{key}: {source}: its tokenizer is another one ({difference}) -> name a model with the same tokenizer"
        )
    machine = detect()

    def choose_dtype(*, checkpoint: "torch.dtype | None") -> "torch.dtype":
        # `auto` is the format of the policy, which this model is compared with.
        asked = run.model.infer_dtype
        return dtype_of(run) if asked == "auto" else inference_dtype(asked, checkpoint=checkpoint, machine=machine)

    quantization = plan(QuantizationConfig(quantization_bit=bits), machine)
    with _under(key):
        model = load_merged(
            replace(run, model=keys), located, machine, choose_dtype, quantization=quantization, scores=scores
        )
    num_known, num_tokens = num_rows(model), len(fitted.tokenizer)
    if num_known < num_tokens:
        raise ModelError(
            f"{key}: {source}: its embedding has {num_known:,} rows, too few for the {num_tokens:,} tokens of this run"
            " -> name a model with the same tokenizer"
        )
    model.requires_grad_(False)
    if takes_fast_path(run):
        from luthier.model.kernels.fuse import fuse

        fuse(model)
    return model


@contextmanager
def _under(key: str) -> Iterator[None]:
    """Reports what is wrong with the model under the key that names it."""
    try:
        yield
    except ModelError as fault:
        raise ModelError(f"{key}: {fault}") from fault


def first_difference(
    ours: "PreTrainedTokenizerBase", theirs: "PreTrainedTokenizerBase", *, but: tuple[str, ...] = ()
) -> str:
    """The first token, in words, that one of the two has under another id; empty if there is none."""
    own, other = ours.get_vocab(), theirs.get_vocab()
    ids = sorted((token_id, token) for token, token_id in own.items() if token not in but)
    for token_id, token in ids:
        if other.get(token) != token_id:
            has = f"has it as {other[token]}" if token in other else "does not have it"
            return f"{token!r} is token {token_id} here, and the other {has}"
    return ""
