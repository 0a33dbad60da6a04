"""One batch that many answers share. Rows join and leave between two steps, so none waits for another to end.

A newcomer's prompt is read alone, and its keys and values are added to the batch (`luthier.infer.cache`). Each row has
its own settings (`luthier.infer.row`). B rows, T columns (the tokens of the longest row), V vocabulary.
"""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.cache_utils import DynamicCache

from luthier.core.errors import LuthierError
from luthier.infer.cache import bytes_per_token, can_be_shared, join, keep
from luthier.infer.decoding import generation_config
from luthier.infer.grammar import Grammars
from luthier.infer.row import Chooser, Row, scored
from luthier.infer.types import Token
from luthier.model.classes import CACHE_NAMES, is_routed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROW_FAULTS = (LuthierError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
"""What may go wrong while one row chooses its token: settings and grammars come from callers. It ends that row only."""


def can_batch(model: "PreTrainedModel") -> bool:
    """Whether rows of this model can share a batch: its state is keys and values, and each token is computed alike."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or is_routed(model.config) or getattr(model, "_is_stateful", False):
        return False
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):  # positions of three dimensions
        return False
    names = _parameters(model)
    return _cache_name(names) is not None and can_be_shared(DynamicCache(config=config))


class RowBatch:
    """The rows that a model works on. Not for several threads."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        stop_ids: frozenset[int],
        grammars: Grammars | None = None,
    ) -> None:
        """`model`: one that `can_batch`."""
        self.model, self.tokenizer, self.stop_ids = model, tokenizer, stop_ids
        self.rows: list[Row] = []
        self.bytes_per_token: int | None = None
        """Known once a prompt has been read."""
        self._cache: DynamicCache | None = None
        self._lengths: list[int] = []
        """How many tokens of each row are in the cache."""
        self._grammars = grammars or Grammars(tokenizer, stop_ids)
        parameters = _parameters(model)
        self._takes_positions = "position_ids" in parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._cache_name = _cache_name(parameters)

    def add(self, row: Row) -> None:
        """Read the prompt of a row and choose its first token. A fault ends this row only."""
        try:
            with torch.no_grad():
                self._add(row)
        except ROW_FAULTS as fault:
            row.fail(fault)

    def step(self) -> None:
        """One more token for every row."""
        self._keep([index for index, row in enumerate(self.rows) if not row.is_canceled])
        if not self.rows:
            return
        with torch.no_grad():
            logits = self._forward(torch.tensor([[row.last_id] for row in self.rows]), self._lengths)[:, -1]
            self._lengths = [length + 1 for length in self._lengths]
            largest = logits.argmax(-1).tolist()
            live = [i for i, row in enumerate(self.rows) if self._takes(row, logits[i], largest[i])]
        self._keep(live)

    def clear(self) -> list[Row]:
        """Drop all rows and return them."""
        rows, self.rows, self._lengths, self._cache = self.rows, [], [], None
        return rows

    def _add(self, row: Row) -> None:
        row.chooser = self._chooser(row)
        if row.num_new_tokens <= 0 and not row.settings.prompt_logprobs:
            row.end()
            return
        mine, lengths, self._cache, self._lengths = self._cache, self._lengths, None, []
        try:
            newcomer = DynamicCache(config=self.model.config.get_text_config(decoder=True))
            self._cache = newcomer
            keeps = 0 if row.settings.prompt_logprobs else 1
            logits = self._forward(torch.tensor([row.prompt_ids]), [0], logits_to_keep=keeps)[0]
        finally:
            self._cache, self._lengths = mine, lengths
        self.bytes_per_token = bytes_per_token(newcomer)
        if row.settings.prompt_logprobs:
            row.prompt_tokens = _scored_prompt(row.prompt_ids, logits, row.settings.num_logprobs or 0)
        if row.num_new_tokens <= 0:
            row.end()
            return
        if row.take(logits[-1]):
            return
        if self._cache is None:
            self._cache = newcomer
        else:
            join(self._cache, newcomer)
        self.rows.append(row)
        self._lengths.append(len(row.prompt_ids))

    def _takes(self, row: Row, logits: Tensor, largest: int) -> bool:
        """Whether the row goes on after this step."""
        assert row.chooser is not None
        try:
            return not row.take(logits, largest if row.chooser.takes_largest else None)
        except ROW_FAULTS as fault:
            row.fail(fault)
            return False

    def _keep(self, live: list[int]) -> None:
        if len(live) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in live]
        self._lengths = [self._lengths[index] for index in live]
        if not self.rows:
            self._cache = None
        elif self._cache is not None:
            keep(self._cache, live, max(self._lengths))

    def _forward(self, input_ids: Tensor, lengths: Sequence[int], logits_to_keep: int = 1) -> Tensor:
        """(B, n) ids, after `lengths` tokens of each row in the cache -> (B, n or `logits_to_keep`, V) logits."""
        device, num_new = self.model.device, input_ids.shape[1]
        before = torch.tensor(lengths, device=device)[:, None]
        num_columns = max(lengths) + num_new
        columns = torch.arange(num_columns, device=device)
        given: dict[str, Any] = {
            "input_ids": input_ids.to(device),
            "attention_mask": (columns >= num_columns - num_new - before).long(),
            self._cache_name or "cache": self._cache,
            "use_cache": True,
        }
        if self._takes_positions:
            given["position_ids"] = before + torch.arange(num_new, device=device)
        if self._keeps_logits:
            given["logits_to_keep"] = logits_to_keep
        return self.model(**given, return_dict=True).logits

    def _chooser(self, row: Row) -> Chooser:
        matcher = None
        if row.settings.grammar is not None:
            matcher = self._grammars.matcher(row.settings.grammar, self._vocab_size())
        return Chooser(row.prompt_ids, row.settings, self._processors(row), matcher)

    def _vocab_size(self) -> int:
        head = self.model.get_output_embeddings()
        return head.weight.shape[0] if head is not None else self.model.config.get_text_config().vocab_size

    def _processors(self, row: Row) -> LogitsProcessorList:
        """What the settings and the model's generation_config.json do to logits.

        `generate` puts it together; it is stopped before it generates.
        """
        config = generation_config(
            row.settings,
            model=self.model,
            num_prompt_tokens=len(row.prompt_ids),
            num_new_tokens=max(row.num_new_tokens, 1),
            stop_ids=row.stop_ids,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        found: list[LogitsProcessorList] = []

        def note(model: Any, input_ids: Tensor, *, logits_processor: LogitsProcessorList, **_: Any) -> Tensor:
            found.append(logits_processor)
            return input_ids

        generate: Any = self.model.generate
        ids = torch.tensor([row.prompt_ids], device=self.model.device)
        generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, custom_generate=note)
        return found[0]


def _parameters(model: "PreTrainedModel") -> Any:
    outer: Any = model
    own = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    return inspect.signature(own.forward).parameters


def _cache_name(parameters: Any) -> str | None:
    return next((name for name in CACHE_NAMES if name in parameters), None)


def _scored_prompt(ids: Sequence[int], logits: Tensor, num_logprobs: int) -> tuple[Token, ...]:
    """The tokens of a prompt, each scored by the (T, V) logits before it; the first one has none."""
    rest = (scored(token_id, row, num_logprobs) for token_id, row in zip(ids[1:], logits[:-1], strict=True))
    return (Token(ids[0]), *rest)
