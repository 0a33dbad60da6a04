"""One batch that many answers share. Rows join and leave between two steps, so none waits for another to end.

The prompts of newcomers are read apart from the batch, those of about the same length together and equal ones once, and
their keys and values are added to it (`luthier.infer.cache`). Each row has its own settings (`luthier.infer.row`).
B rows, T columns (the tokens of the longest row), V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from luthier.infer.cache import bytes_per_token, can_be_shared, filled_up, has_windows, join, keep, new_cache
from luthier.infer.grammar import Grammars
from luthier.infer.lean_step import LeanStep, lean_step
from luthier.infer.processors import Processors
from luthier.infer.row import ROW_FAULTS, Chooser, Row, chosen_together, scored
from luthier.infer.types import Token
from luthier.model.classes import is_routed
from luthier.model.failed_device import require_working_device
from luthier.model.modules import cache_name, forward_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS_READ = 1024
"""Prompts are read together up to this many tokens, padding included; beyond, a matrix product gains nothing, and the
rows that wait for their next token would wait longer."""
MIN_SHARE_READ = 0.75
"""The share of these tokens that must not be padding."""


def num_read_together(rows: Sequence[Row]) -> int:
    """How many of the first rows are read at once: at least one."""
    if rows[0].settings.prompt_logprobs:
        return 1
    lengths: dict[tuple[int, ...], int] = {}
    for count, row in enumerate(rows):
        lengths[tuple(row.prompt_ids)] = len(row.prompt_ids)
        num_tokens = len(lengths) * max(lengths.values())
        fits = num_tokens <= MAX_TOKENS_READ and sum(lengths.values()) >= MIN_SHARE_READ * num_tokens
        if row.settings.prompt_logprobs or not (len(lengths) == 1 or fits):
            return count
    return len(rows)


def can_batch(model: "PreTrainedModel") -> bool:
    """Whether rows of this model can share a batch: its state is keys and values, and each token is computed alike."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or is_routed(model.config) or getattr(model, "_is_stateful", False):
        return False
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):  # positions of three dimensions
        return False
    return cache_name(model) is not None and can_be_shared(DynamicCache(config=config))


class RowBatch:
    """The rows that a model works on. Not for several threads."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        stop_ids: frozenset[int],
        grammars: Grammars | None = None,
        *,
        fast_path: bool = True,
    ) -> None:
        """`model`: one that `can_batch`. `fast_path`: each step leaves out the model's own code where it can."""
        self.model, self.tokenizer, self.stop_ids = model, tokenizer, stop_ids
        self.rows: list[Row] = []
        self.bytes_per_token: int | None = None
        """Known once a prompt has been read."""
        self._cache: DynamicCache | None = None
        self._lengths: list[int] = []
        """How many tokens of each row are in the cache."""
        self._grammars = grammars or Grammars(tokenizer, stop_ids)
        self._processors = Processors(model, tokenizer)
        parameters = forward_parameters(model)
        self._takes_positions = "position_ids" in parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._cache_name = cache_name(model)
        self._fast_path = fast_path
        self._lean: LeanStep | None = None
        """Of the model as it is since the first row came."""

    def add(self, rows: Sequence[Row]) -> None:
        """Read the prompts of rows and choose their first tokens. A fault of one row ends this row only.

        `rows`: those of `num_read_together`.
        """
        ready = [row for row in rows if self._is_ready(row)]
        if not ready:
            return
        read = None
        try:
            with torch.no_grad():
                read = self._read(ready)
        except ROW_FAULTS as fault:
            require_working_device(fault)
            if len(ready) == 1:
                ready[0].fail(fault)
                return
        if read is None:  # Which of them was it? Not above: as long as the fault is handled, it holds its tensors.
            for row in ready:
                self.add([row])
            return
        try:
            with torch.no_grad():
                self._admit(ready, *read)
        except ROW_FAULTS as fault:  # such as memory that is refused
            require_working_device(fault)
            for row in ready:
                row.fail(fault)

    def step(self) -> None:
        """One more token for every row."""
        self._keep([index for index, row in enumerate(self.rows) if not row.is_canceled])
        if not self.rows:
            return
        with torch.no_grad():
            self._lengths = [length + 1 for length in self._lengths]
            logits = self._next_logits()
            tokens = _chosen_together(logits, self.rows)
            live = [i for i, row in enumerate(self.rows) if self._takes(row, logits[i], tokens[i])]
        self._keep(live)

    def _next_logits(self) -> Tensor:
        """(B, V)"""
        last_ids = torch.tensor([[row.last_id] for row in self.rows])
        if self._lean is None or self._cache is None:
            return self._forward(last_ids, self._lengths, self._cache)[:, -1]
        return self._lean(last_ids.to(self.model.device), self._lengths, self._cache)

    def clear(self) -> list[Row]:
        """Drop all rows and return them."""
        rows, self.rows, self._lengths, self._cache = self.rows, [], [], None
        return rows

    def _is_ready(self, row: Row) -> bool:
        """Whether the prompt of the row must be read."""
        try:
            row.chooser = self._chooser(row)
        except ROW_FAULTS as fault:
            require_working_device(fault)
            row.fail(fault)
            return False
        if row.num_new_tokens <= 0 and not row.settings.prompt_logprobs:
            row.end()
            return False
        return True

    def _read(self, rows: list[Row]) -> tuple[list[int], Tensor, DynamicCache]:
        """Read prompts, equal ones once.

        Returns the index of each row's prompt, the logits (prompts, 1 or T, V) and the keys and values.
        """
        prompts = {prompt: index for index, prompt in enumerate(dict.fromkeys(tuple(row.prompt_ids) for row in rows))}
        width = max(map(len, prompts))
        padded = torch.tensor([[*(0,) * (width - len(prompt)), *prompt] for prompt in prompts])
        cache = new_cache(self.model.config.get_text_config(decoder=True))
        keeps = 0 if rows[0].settings.prompt_logprobs else 1
        logits = self._forward(padded, [len(prompt) for prompt in prompts], cache, logits_to_keep=keeps)
        return [prompts[tuple(row.prompt_ids)] for row in rows], logits, cache

    def _admit(self, rows: list[Row], prompts: list[int], logits: Tensor, cache: DynamicCache) -> None:
        """Choose the first tokens of rows and add those whose answers go on. Arguments as `_read` returns them."""
        self.bytes_per_token = bytes_per_token(cache)
        live: list[tuple[Row, int]] = []
        tokens = _chosen_together(logits[prompts, -1], rows)
        for row, prompt, token in zip(rows, prompts, tokens, strict=True):
            if row.settings.prompt_logprobs:
                row.prompt_tokens = _scored_prompt(row.prompt_ids, logits[prompt], row.settings.num_logprobs or 0)
            if row.num_new_tokens <= 0:
                row.end()
            elif self._takes(row, logits[prompt, -1], token):
                live.append((row, prompt))
        if not live:
            return
        lengths = [len(row.prompt_ids) for row, _ in live]
        keep(cache, [prompt for _, prompt in live], max(lengths))
        if self._cache is None:
            self._cache = cache
            self._lean = lean_step(self.model) if self._fast_path and not has_windows(cache) else None
        else:
            join(self._cache, cache)
        self.rows += [row for row, _ in live]
        self._lengths += lengths

    def _takes(self, row: Row, logits: Tensor, chosen: int | None) -> bool:
        """Add the next token of a row, `chosen` or to be chosen. Returns whether its answer goes on."""
        try:
            return not row.take(logits, chosen)
        except ROW_FAULTS as fault:
            require_working_device(fault)
            row.fail(fault)
            return False

    def _keep(self, live: list[int]) -> None:
        if len(live) == len(self.rows):
            return
        live = filled_up(live)
        self.rows = [self.rows[index] for index in live]
        self._lengths = [self._lengths[index] for index in live]
        if not self.rows:
            self._cache = None
        elif self._cache is not None:
            keep(self._cache, live, max(self._lengths))

    def _forward(
        self, input_ids: Tensor, lengths: Sequence[int], cache: "DynamicCache | None", logits_to_keep: int = 1
    ) -> Tensor:
        """(B, n) ids -> (B, n or `logits_to_keep`, V) logits.

        `lengths`: the tokens of each row, these included. Columns before them are padding, here and in the cache.
        """
        device, num_new = self.model.device, input_ids.shape[1]
        ends = torch.tensor(lengths, device=device)[:, None]
        num_columns = max(lengths)
        given: dict[str, Any] = {
            "input_ids": input_ids.to(device),
            "attention_mask": (torch.arange(num_columns, device=device) >= num_columns - ends).long(),
            self._cache_name or "cache": cache,
            "use_cache": True,
        }
        if self._takes_positions:
            given["position_ids"] = (ends - num_new + torch.arange(num_new, device=device)).clamp(min=0)
        if self._keeps_logits:
            given["logits_to_keep"] = logits_to_keep
        return self.model(**given, return_dict=True).logits

    def _chooser(self, row: Row) -> Chooser:
        matcher = None
        if row.settings.grammar is not None:
            matcher = self._grammars.matcher(row.settings.grammar, self._vocab_size())
        return Chooser(row.prompt_ids, row.settings, self._processors.of(row), matcher)

    def _vocab_size(self) -> int:
        head = self.model.get_output_embeddings()
        return head.weight.shape[0] if head is not None else self.model.config.get_text_config().vocab_size


def _chosen_together(logits: Tensor, rows: Sequence[Row]) -> list[int | None]:
    return chosen_together(logits, [row.chooser for row in rows if row.chooser is not None])


def _scored_prompt(ids: Sequence[int], logits: Tensor, num_logprobs: int) -> tuple[Token, ...]:
    """The tokens of a prompt, each scored by the (T, V) logits before it; the first one has none."""
    rest = (scored(token_id, row, num_logprobs) for token_id, row in zip(ids[1:], logits[:-1], strict=True))
    return (Token(ids[0]), *rest)
