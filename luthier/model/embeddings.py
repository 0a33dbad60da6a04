"""Rows of the input embedding and of the output head: counted, added and initialized.

A new row starts as the mean of the known rows plus N(0, 1/sqrt(dim)) noise (`noise_init`), as the mean of the rows of
the tokens that describe it (`desc_init`), or as the latter plus noise (`desc_init_w_noise`). The number of rows becomes
a multiple of 64, a good size for matrix units.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


ROWS_MULTIPLE = 64


Init = Literal["noise_init", "desc_init", "desc_init_w_noise"]


def num_rows(model: "PreTrainedModel") -> int:
    """Rows of the input embedding."""
    embedding: Any = model.get_input_embeddings()
    return embedding.weight.shape[0]


def fit_embeddings(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    added_tokens: Sequence[str] = (),
    descriptions: Mapping[str, str] | None = None,
    init: Init = "noise_init",
    seed: int = 0,
) -> bool:
    """Give every token of `tokenizer` a row and start the rows of `added_tokens`; True if anything was new.

    `descriptions`: added token -> text, for the two `desc` ways. The same `seed` gives the same rows on every process.
    """
    import torch

    rows_before = num_rows(model)
    if len(tokenizer) > rows_before:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=ROWS_MULTIPLE, mean_resizing=False)
    vocabulary = tokenizer.get_vocab()
    added_ids = {token: vocabulary[token] for token in added_tokens}
    new_ids = sorted({*added_ids.values(), *range(rows_before, num_rows(model))})
    if not new_ids:
        return False
    described = {}
    if init != "noise_init":
        for token, text in (descriptions or {}).items():
            if token in added_ids:
                described[added_ids[token]] = tokenizer.encode(text, add_special_tokens=False)
    generator = torch.Generator().manual_seed(seed)
    for weight in _weights(model):
        _start_rows(weight, new_ids, rows_before, described, init, generator)
    return True


def grow_embeddings(model: "PreTrainedModel", rows: int) -> None:
    """Make room for the embedding of an adapter that was trained with more rows; its values come with the adapter."""
    model.resize_token_embeddings(rows, mean_resizing=False)


def _weights(model: "PreTrainedModel") -> "list[Tensor]":
    """The embedding, and the head if it has a matrix of its own."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    return [embedding.weight] if tied else [embedding.weight, head.weight]


def _start_rows(
    weight: "Tensor",
    new_ids: list[int],
    rows_before: int,
    described: Mapping[int, list[int]],
    init: Init,
    generator: object,
) -> None:
    import torch

    with torch.no_grad():
        new = set(new_ids)
        known = torch.tensor([row for row in range(rows_before) if row not in new])
        mean = weight[known].float().mean(0)
        std = weight.shape[1] ** -0.5
        for row in new_ids:
            noise = torch.empty(weight.shape[1]).normal_(std=std, generator=generator).to(weight.device)  # type: ignore[arg-type]
            tokens = [token for token in described.get(row, ()) if token not in new]
            if tokens:
                start = weight[tokens].float().mean(0)
                weight[row] = start + noise if init == "desc_init_w_noise" else start
            else:
                weight[row] = mean + noise


def embedding_names(model: "PreTrainedModel") -> tuple[str, ...]:
    """The module names of the input embedding and, if there is one, of the output head."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return tuple(name for name, module in model.named_modules() if any(module is wanted for wanted in modules))
