"""Rows of the input embedding and of the output head: counted, added and initialized.

In training a new row starts as the mean of the known rows plus N(0, 1/sqrt(dim)) noise (`noise_init`), as the mean of
the rows of the tokens that describe it (`desc_init`), or as the latter plus noise (`desc_init_w_noise`), and it is
trained and saved. Where a row is still missing after that, it is the mean of the rows of the pieces that the model's
own tokenizer cuts its token into, the same in every program. The number of rows becomes a multiple of 64, a good size
for matrix units.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from luthier.core.errors import ModelError
from luthier.core.log import warn
from luthier.model.files.sources import ModelSource
from luthier.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


ROWS_MULTIPLE = 64
_PART = 4096
"""Rows of a table of gigabytes that are turned into float32 together."""


Init = Literal["noise_init", "desc_init", "desc_init_w_noise"]


@dataclass(frozen=True, slots=True)
class NewRows:
    """The rows that training has to learn: base models do not have them, or not with these values."""

    ids: tuple[int, ...] = ()
    """Of tokens that the model has never seen."""
    is_whole: bool = False
    """Whether all rows are trained and saved, since their number is or may be another one."""
    in_table: tuple[int, ...] = ()
    """Of `layer_table`: the rows that it has got."""
    trains_single: bool = True
    """Whether single rows can be trained. Those of sharded weights cannot."""

    def __bool__(self) -> bool:
        return bool(self.ids) or self.is_whole


@dataclass(frozen=True, slots=True)
class NewTokens:
    """The tokens that a training run adds, and how their rows start."""

    tokenizer: "PreTrainedTokenizerBase"
    added: tuple[str, ...] = ()
    descriptions: Mapping[str, str] = field(default_factory=dict)
    """Added token -> what it means."""
    init: Init = "noise_init"
    seed: int = 0
    trains_whole: bool = False
    """Whether all rows are trained even if their number stays."""
    trains_single: bool = True
    """See `NewRows`."""

    def are_new_to(self, model: "PreTrainedModel") -> bool:
        """Whether the model has rows to get or to learn."""
        return bool(self.added) or len(self.tokenizer) > num_rows(model)

    def give_rows(self, model: "PreTrainedModel") -> NewRows:
        """Every token gets a row. Returns the rows to be trained."""
        rows_before, in_table = num_rows(model), _num_table_rows(model)
        fit_embeddings(
            model,
            self.tokenizer,
            added_tokens=self.added,
            descriptions=self.descriptions,
            init=self.init,
            seed=self.seed,
        )
        vocabulary = self.tokenizer.get_vocab() if self.added else {}  # slow for large ones
        ids = {*(vocabulary[token] for token in self.added), *range(rows_before, num_rows(model))}
        return NewRows(
            tuple(sorted(ids)),
            is_whole=self.trains_whole or num_rows(model) > rows_before,
            in_table=tuple(range(in_table, _num_table_rows(model))),
            trains_single=self.trains_single,
        )


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

    rows_before, in_table = num_rows(model), _num_table_rows(model)
    if len(tokenizer) > rows_before:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=ROWS_MULTIPLE, mean_resizing=False)
    vocabulary = tokenizer.get_vocab() if added_tokens else {}
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
    _start_table(model, in_table, rows_before, described)
    return True


def grow_embeddings(model: "PreTrainedModel", rows: int, pieces: Mapping[int, Sequence[int]] | None = None) -> None:
    """More rows: each the mean of those of its `pieces`, or of all rows that were there.

    `pieces`: new id -> known ids. An adapter that was trained with more rows brings values of its own.
    """
    import torch

    rows_before, in_table = num_rows(model), _num_table_rows(model)
    model.resize_token_embeddings(rows, mean_resizing=False)
    for weight in _weights(model):
        with torch.no_grad():
            known = weight[:rows_before].float()
            weight[rows_before:] = known.mean(0).to(weight.dtype)
            for row, ids in (pieces or {}).items():
                weight[row] = known[list(ids)].mean(0).to(weight.dtype)
    _start_table(model, in_table, rows_before, pieces or {})


def add_missing_rows(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", source: ModelSource) -> bool:
    """Rows for tokens that were added and never trained, if there are any; a warning says so.

    `source`: of the model, whose own tokenizer cuts the tokens into the pieces that their rows are the mean of.
    Raises `ModelError` for an embedding with an adapter on it.
    """
    import torch

    rows_before = num_rows(model)
    missing = range(rows_before, len(tokenizer))
    if not missing:
        return False
    if not isinstance(model.get_input_embeddings(), torch.nn.Embedding):
        raise ModelError(
            f"the tokenizer has {len(missing)} tokens without a row, and the embedding has an adapter, so it cannot get"
            " more rows -> leave out the tokens that training did not add"
        )
    own, pieces = load_tokenizer(source), {}
    for index, token in zip(missing, tokenizer.convert_ids_to_tokens(list(missing)), strict=True):
        known = [piece for piece in own.encode(token, add_special_tokens=False) if piece < rows_before]
        if known:
            pieces[index] = known
    grow_embeddings(model, -(-len(tokenizer) // ROWS_MULTIPLE) * ROWS_MULTIPLE, pieces)
    warn(
        f"the tokenizer has {len(missing)} tokens that this model and its adapters were never trained on; their"
        " embeddings are the mean of those of their pieces"
    )
    return True


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


def layer_table(model: "PreTrainedModel") -> "nn.Embedding | None":
    """The second embedding of a model that each layer reads too (Gemma 3n, Gemma 4); it grows with the first one."""
    model_: Any = model
    if not getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None):
        return None
    found: nn.Embedding = model_.get_per_layer_input_embeddings()
    return found


def _num_table_rows(model: "PreTrainedModel") -> int:
    table = layer_table(model)
    return 0 if table is None else table.weight.shape[0]


def _start_table(
    model: "PreTrainedModel", in_table: int, rows_before: int, described: Mapping[int, Sequence[int]]
) -> None:
    """New rows of `layer_table`: the mean of those of their pieces, or of all rows.

    `in_table`: rows that it had. The first one stands for tokens of the model beyond these.
    """
    import torch

    table = layer_table(model)
    if table is None or table.weight.shape[0] == in_table:
        return
    with torch.no_grad():
        weight, known = table.weight, table.weight[:in_table]
        weight[in_table:] = weight[0]
        total = torch.stack([part.float().sum(0) for part in known.split(_PART)]).sum(0)
        weight[max(in_table, rows_before) :] = (total / in_table).to(weight.dtype)
        for row, ids in described.items():
            pieces = [index for index in ids if index < in_table]
            if row >= in_table and pieces:
                weight[row] = weight[pieces].float().mean(0).to(weight.dtype)


def embedding_names(model: "PreTrainedModel") -> tuple[str, ...]:
    """The module names of the input embedding and, if there is one, of the output head."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return tuple(name for name, module in model.named_modules() if any(module is wanted for wanted in modules))
