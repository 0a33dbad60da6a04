"""Log-probabilities of given continuations: log p(continuation | context), summed over its tokens.

A context that several continuations share is read once, and so is a beginning that several contexts share: their keys
and values are kept, and only what follows is computed for each. The numbers are those of reading each text in full.

    beginning          read in one row
      contexts         what follows in each of n rows, padded on the left
        continuations  all but the last token of each of m rows, padded on the right

The rule for texts is that of lm-evaluation-harness: see `encode_pair`.
P tokens of the beginning, W columns of the contexts, V vocabulary.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from luthier.infer.batching import can_batch
from luthier.infer.decoding import num_positions
from luthier.infer.sampling import no_numbers
from luthier.model.heads.output_head import hidden_instead_of_logits, inspect_head
from luthier.model.modules import cache_name, forward_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MIN_BEGINNING = 32
"""Tokens that contexts must share to be read once; fewer are not worth a pass of their own."""
MAX_CACHED_TOKENS = 16384
"""In all rows of the last pass. More continuations are read in several passes."""
LOGITS_AT_ONCE = 256
"""Positions whose logits are in memory together."""
DEFAULT_LENGTH = 2048
"""The window for a whole text, if the model takes sequences of any length."""


@dataclass(frozen=True, slots=True)
class Pair:
    context: tuple[int, ...]
    """At least one token."""
    continuation: tuple[int, ...]
    """At least one token."""


@dataclass(frozen=True, slots=True)
class Score:
    logprob: float
    """The natural logarithm of the probability of the continuation."""
    is_greedy: bool
    """Whether each of its tokens is the most likely one."""


class Scorer:
    """Scores with one model, which is in evaluation mode. `batch_size`: contexts that are read together."""

    def __init__(self, model: "PreTrainedModel", batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.max_length = num_positions(model)
        """The longest sequence that the model takes; None without a limit."""
        self._head = inspect_head(model)
        self._cache_name = cache_name(model)
        self._shares = can_batch(model) and "position_ids" in forward_parameters(model)
        self._beginning: tuple[tuple[int, ...], DynamicCache] | None = None

    def scores(self, pairs: Sequence[Pair], beginning: Sequence[int] | None = None) -> list[Score]:
        """One score for each pair, in order. Contexts that are too long lose tokens on the left.

        `beginning`: what the contexts begin with, if the caller knows it. It is kept for the next call.
        """
        cut = [self._cut(pair) for pair in pairs]
        found: dict[Pair, Score] = {}
        contexts = sorted({pair.context for pair in cut}, key=lambda ids: (-len(ids), ids))
        of_context: dict[tuple[int, ...], list[Pair]] = {context: [] for context in contexts}
        for pair in dict.fromkeys(cut):
            of_context[pair.context].append(pair)
        with torch.inference_mode():
            for start in range(0, len(contexts), self.batch_size):
                chunk = contexts[start : start + self.batch_size]
                asked = [pair for context in chunk for pair in of_context[context]]
                if self._shares:
                    found |= self._shared(chunk, asked, self._beginning_of(chunk, beginning))
                else:
                    found |= self._in_full(asked)
        return [found[pair] for pair in cut]

    def letter_logprobs(
        self,
        contexts: Sequence[Sequence[int]],
        letters: Sequence[Sequence[int]],
        beginning: Sequence[int] | None = None,
    ) -> list[list[float]]:
        """For each context, the log-probabilities of its single-token answers `letters`, over the whole vocabulary."""
        pairs = [
            Pair(tuple(context), (letter,)) for context, own in zip(contexts, letters, strict=True) for letter in own
        ]
        scores = iter(self.scores(pairs, beginning))
        return [[next(scores).logprob for _ in own] for own in letters]

    def _cut(self, pair: Pair) -> Pair:
        """The last token is predicted and not read, so one token more than `max_length` fits."""
        assert pair.context and pair.continuation
        if self.max_length is None:
            return pair
        room = self.max_length + 1 - len(pair.continuation)
        assert room > 0, "a continuation alone must fit"
        return Pair(pair.context[-room:], pair.continuation)

    def _beginning_of(self, contexts: Sequence[tuple[int, ...]], given: Sequence[int] | None) -> tuple[int, ...]:
        """What is read once for all of these contexts. At least one token of each is left for its own row."""
        known = shared_beginning(contexts) if given is None else tuple(given)
        fits = all(len(context) > len(known) and context[: len(known)] == known for context in contexts)
        if given is not None and not fits:
            return ()
        if len(known) < MIN_BEGINNING or (given is None and len(contexts) == 1):
            return ()
        # Padding stands between the beginning and the rest of a shorter context, and a window counts columns.
        has_windows = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in self._new_cache().layers)
        return () if has_windows and len({len(context) for context in contexts}) > 1 else known

    def _shared(
        self, contexts: Sequence[tuple[int, ...]], pairs: Sequence[Pair], beginning: tuple[int, ...]
    ) -> dict[Pair, Score]:
        """The scores of pairs whose contexts are these."""
        num_shared = len(beginning)
        cache = self._read_beginning(beginning, len(contexts))
        rests = [context[num_shared:] for context in contexts]
        width = max(map(len, rests))
        mask = torch.tensor([[1] * num_shared + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests])
        ids = torch.tensor([[*(0,) * (width - len(rest)), *rest] for rest in rests])
        last = self._forward(ids, mask, cache)[:, -1]
        row_of = {context: row for row, context in enumerate(contexts)}
        longer = [pair for pair in pairs if len(pair.continuation) > 1]
        states: dict[Pair, Tensor] = {}
        size = max(self.batch_size, MAX_CACHED_TOKENS // mask.shape[1])
        for start in range(0, len(longer), size):
            chunk = longer[start : start + size]
            rows = [row_of[pair.context] for pair in chunk]
            own = copy.deepcopy(cache) if start + size < len(longer) else cache
            own.batch_select_indices(torch.tensor(rows, device=last.device))
            states |= self._read_continuations(chunk, mask[rows], own)
        hidden = [
            torch.cat([last[row_of[pair.context]][None], states[pair]])
            if pair in states
            else last[[row_of[pair.context]]]
            for pair in pairs
        ]
        return dict(zip(pairs, self._judge(pairs, hidden), strict=True))

    def _read_beginning(self, beginning: tuple[int, ...], num_rows: int) -> DynamicCache:
        """Its keys and values, in so many rows."""
        if not beginning:
            return self._new_cache()
        if self._beginning is None or self._beginning[0] != beginning:
            cache = self._new_cache()
            self._forward(torch.tensor([beginning]), torch.ones(1, len(beginning), dtype=torch.long), cache)
            self._beginning = beginning, cache
        rows = copy.deepcopy(self._beginning[1])
        rows.batch_repeat_interleave(num_rows)
        return rows

    def _read_continuations(self, pairs: Sequence[Pair], mask: Tensor, cache: DynamicCache) -> dict[Pair, Tensor]:
        """Pair -> what the model makes of each token of its continuation but the last. Changes `cache`."""
        inputs = [pair.continuation[:-1] for pair in pairs]
        width = max(map(len, inputs))
        ids = torch.tensor([[*one, *(0,) * (width - len(one))] for one in inputs])
        own = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in inputs])
        states = self._forward(ids, torch.cat([mask, own], 1), cache)
        return {pair: row[: len(one)] for pair, one, row in zip(pairs, inputs, states, strict=True)}

    def _in_full(self, pairs: Sequence[Pair]) -> dict[Pair, Score]:
        """Each pair in a row of its own, for models whose state is not keys and values alone."""
        found: dict[Pair, Score] = {}
        for start in range(0, len(pairs), self.batch_size):
            chunk = pairs[start : start + self.batch_size]
            texts = [(*pair.context, *pair.continuation[:-1]) for pair in chunk]
            width = max(map(len, texts))
            ids = torch.tensor([[*text, *(0,) * (width - len(text))] for text in texts])
            mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
            states = self._forward(ids, mask, None)
            hidden = [
                row[len(text) - len(pair.continuation) : len(text)]
                for pair, text, row in zip(chunk, texts, states, strict=True)
            ]
            found |= dict(zip(chunk, self._judge(chunk, hidden), strict=True))
        return found

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    def _forward(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None) -> Tensor:
        """(rows, n) ids -> (rows, n, width) hidden states, or (rows, n, V) logits of a model that changes its logits.

        `mask` (rows, columns): the columns of the cache, then those of `ids`; 0 is padding.
        """
        device = self.model.device
        given: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if cache is None:
            given["use_cache"] = False
        else:
            assert self._cache_name is not None
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            given |= {"position_ids": positions.to(device), self._cache_name: cache, "use_cache": True}
        if self._head.linear is None:
            return self.model(**given).logits
        with hidden_instead_of_logits(self._head.linear):
            return self.model(**given).logits

    def _judge(self, pairs: Sequence[Pair], states: Sequence[Tensor]) -> Iterator[Score]:
        """`states`: for each pair, what predicts each token of its continuation. Raises `RunFailed` for NaN."""
        together = torch.cat(list(states))
        targets = torch.tensor([token for pair in pairs for token in pair.continuation], device=together.device)
        logprobs, hits = [], []
        for part, own in zip(together.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True):
            logits = (part if self._head.linear is None else self._head.linear(part)).float()
            logprobs.append(logits.log_softmax(-1).gather(-1, own[:, None]).squeeze(-1))
            hits.append(logits.argmax(-1) == own)
        lengths = [len(pair.continuation) for pair in pairs]
        found = torch.cat(logprobs)
        if bool(found.isnan().any()):
            raise no_numbers()
        for logprob, hit in zip(found.split(lengths), torch.cat(hits).split(lengths), strict=True):
            yield Score(logprob.sum().item(), bool(hit.all()))


def shared_beginning(contexts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all of these begin with, short of the last token of the shortest."""
    first, last = min(contexts), max(contexts)  # of sorted sequences, these two differ first
    limit = min(map(len, contexts)) - 1
    count = 0
    while count < limit and first[count] == last[count]:
        count += 1
    return first[:count]


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """With the tokens that the tokenizer puts around a text, unless the text begins with them already."""
    start = str(tokenizer.decode([prefix_token_id(tokenizer)]))
    return list(tokenizer.encode(text, add_special_tokens=False) if text.startswith(start) else tokenizer.encode(text))


def prefix_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """What stands before a text without a context."""
    found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    assert isinstance(found, int), "a fitted tokenizer has an end token"
    return found


def encode_pair(tokenizer: "PreTrainedTokenizerBase", context: str, continuation: str) -> Pair:
    """The token ids of two texts that are tokenized as one, and cut where the context alone would end.

    Spaces at the end of the context belong to the continuation, since tokens begin with them.
    """
    if not context:
        ids = list(tokenizer.encode(continuation, add_special_tokens=False))
        prefix = prefix_token_id(tokenizer)
        return Pair(tuple(ids[:1]), tuple(ids[1:])) if ids[0] == prefix else Pair((prefix,), tuple(ids))
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    whole = encode(tokenizer, bare + continuation)
    count = len(encode(tokenizer, bare))
    return Pair(tuple(whole[:count]), tuple(whole[count:]))


def rolling_pairs(ids: Sequence[int], prefix_id: int, max_length: int | None) -> list[Pair]:
    """A whole text as windows in which each token is predicted once, with as much before it as fits in the last one."""
    size = max_length or DEFAULT_LENGTH
    pairs = [Pair((prefix_id,), tuple(ids[:size]))] if ids else []
    for start in range(size, len(ids), size):
        end = min(start + size, len(ids))
        pairs.append(Pair(tuple(ids[max(end - size - 1, 0) : start]), tuple(ids[start:end])))
    return pairs
