"""One answer in the making: which token it takes next, what of its text is final, and when it ends.

V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from luthier.core.errors import InvalidInput, LuthierError
from luthier.infer.decoding import TextStream
from luthier.infer.sampling import chosen_tokens, largest_tokens, sample_tokens
from luthier.infer.stops import StopStrings
from luthier.infer.types import Answer, Piece, Settings, Token
from luthier.model.failed_device import require_working_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.infer.engines import Delivery
    from luthier.infer.grammar import Matcher

_REPLACED = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
"""What `chosen_tokens` does itself, faster."""
_RARE = (TopHLogitsWarper, TypicalLogitsWarper, EpsilonLogitsWarper, EtaLogitsWarper)
"""Other ways to leave out tokens. They come after temperature and the like, so then transformers does all of it."""


ROW_FAULTS = (LuthierError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
"""What may go wrong while one row chooses its token: settings and grammars come from callers. It ends that row only,
unless the device has failed (`require_working_device`)."""
Candidates = tuple[float, int, float, float]
"""Temperature, top-k, top-p and min-p. Answers with the same ones choose their next tokens together."""


def chosen_together(logits: Tensor, choosers: "Sequence[Chooser]") -> list[int | None]:
    """The next token of each answer from the (B, V) logits; None for one that must choose by itself.

    Where the settings of some lead to a fault, these choose by themselves, so that it ends no other answer.
    """
    alike: dict[Candidates | None, list[int]] = {}
    for index, chooser in enumerate(choosers):
        if chooser.takes_largest or chooser.candidates is not None:
            alike.setdefault(chooser.candidates, []).append(index)
    tokens: list[int | None] = [None] * len(choosers)
    for candidates, rows in alike.items():
        scores = logits if len(rows) == len(choosers) else logits[rows]
        numbers = None if candidates is None else torch.cat([choosers[row].number() for row in rows])
        try:
            if candidates is None or numbers is None:
                found = largest_tokens(scores)
            else:
                settings = choosers[rows[0]].settings
                found = chosen_tokens(scores.float(), settings, numbers.to(logits.device), candidates[-1])
        except ROW_FAULTS as fault:
            require_working_device(fault)
            continue
        for row, token_id in zip(rows, found.tolist(), strict=True):
            tokens[row] = token_id
    return tokens


class Chooser:
    """Chooses the tokens of one answer from logits. With a seed they depend on nothing else."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        settings: Settings,
        processors: LogitsProcessorList,
        matcher: "Matcher | None" = None,
    ) -> None:
        """`processors`: of transformers, for the settings and the model's generation_config.json."""
        self.settings, self.matcher = settings, matcher
        self._ids = list(prompt_ids)
        self._min_p = next((one.min_p for one in processors if isinstance(one, MinPLogitsWarper)), 0.0)
        self._has_rare = any(isinstance(one, _RARE) for one in processors)
        left = processors if self._has_rare else [one for one in processors if not isinstance(one, _REPLACED)]
        self._processors = LogitsProcessorList(left)
        self._counts: Counter[int] = Counter()
        self._biased = torch.tensor(list(settings.logit_bias), dtype=torch.long)
        self._biases = torch.tensor(list(settings.logit_bias.values()), dtype=torch.float32)
        self._generator = torch.Generator()
        seed = int(torch.randint(2**62, ())) if settings.seed is None else settings.seed
        self._generator.manual_seed(seed % 2**63)
        penalized = bool(settings.presence_penalty or settings.frequency_penalty or settings.logit_bias)
        is_plain = not penalized and not self._processors and matcher is None
        self.takes_largest = is_plain and settings.is_greedy
        """Whether the next token is always that of the largest logit."""
        self.candidates: Candidates | None = None
        """What alone decides, beside the logits and a random number, which token is next; None if there is more."""
        if is_plain and not settings.is_greedy:
            self.candidates = settings.temperature, settings.top_k, settings.top_p, self._min_p

    def choose(self, logits: Tensor) -> int:
        """The next token, given the (V,) logits in float32."""
        token_id = int(largest_tokens(logits)) if self.takes_largest else self._choose(logits)
        self.add(token_id)
        return token_id

    def add(self, token_id: int) -> None:
        """Note a token that was chosen."""
        self._ids.append(token_id)
        self._counts[token_id] += 1
        if self.matcher is not None:
            self.matcher.advance(token_id)

    def _choose(self, logits: Tensor) -> int:
        scores, settings = logits.clone(), self.settings
        if settings.presence_penalty or settings.frequency_penalty:
            seen = torch.tensor(list(self._counts), dtype=torch.long, device=scores.device)
            counts = torch.tensor(list(self._counts.values()), dtype=scores.dtype, device=scores.device)
            scores[seen] -= settings.presence_penalty + settings.frequency_penalty * counts
        if settings.logit_bias:
            scores[self._biased.to(scores.device)] += self._biases.to(scores)
        if self.matcher is not None:
            scores = self.matcher.mask(scores)
        if self._processors:
            ids = torch.tensor([self._ids], device=scores.device)
            scores = self._processors(ids, scores[None])[0]  # type: ignore[arg-type]
        if settings.is_greedy:
            return int(largest_tokens(scores))
        numbers = self.number().to(scores.device)
        if self._has_rare:
            return int(sample_tokens(scores[None], numbers))
        return int(chosen_tokens(scores[None], settings, numbers, self._min_p))

    def number(self) -> Tensor:
        """(1,) the next random number of this answer, in [0, 1)."""
        return torch.rand(1, generator=self._generator, dtype=torch.float64)


class Row:
    """One answer in the making."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        settings: Settings,
        *,
        num_new_tokens: int,
        stop_ids: Collection[int],
        tokenizer: "PreTrainedTokenizerBase | None",
        deliver: "Callable[[Delivery], None]",
    ) -> None:
        """`num_new_tokens`: the most that the answer may have. `stop_ids`: of the model. `tokenizer`: None if the ids
        of the answer are wanted, and no text."""
        self.prompt_ids, self.settings, self.num_new_tokens = list(prompt_ids), settings, num_new_tokens
        self.stop_ids = frozenset(settings.stop_token_ids) | (
            frozenset() if settings.ignore_eos else frozenset(stop_ids)
        )
        self.is_canceled = self.has_ended = False
        self.seen: Callable[[], Mapping[str, Tensor]] | None = None
        """Makes what the model takes beside a prompt with images, which takes long: for the thread of the model."""
        self.prompt_tokens: tuple[Token, ...] = ()
        self.chooser: Chooser | None = None
        self._text = None if tokenizer is None else TextStream(tokenizer, settings.skip_special_tokens)
        self._stops = StopStrings(settings.stop)
        self._deliver = deliver
        self._written: list[str] = []
        self._tokens: list[Token] = []
        self._num_delivered = 0

    @property
    def num_tokens(self) -> int:
        """Of the prompt and the answer so far."""
        return len(self.prompt_ids) + len(self._tokens)

    @property
    def last_id(self) -> int:
        return self._tokens[-1].id

    def take(self, logits: Tensor, chosen: int | None = None) -> bool:
        """Choose a token from the (V,) logits, or take the `chosen` one. Returns whether the answer has ended."""
        assert self.chooser is not None
        if chosen is None:
            logits = logits.float()
            token_id = self.chooser.choose(logits)
        else:
            token_id = chosen
            self.chooser.add(token_id)
        return self.push(scored(token_id, logits, self.settings.num_logprobs))

    def push(self, token: Token) -> bool:
        """Add a token. Returns whether the answer has ended."""
        self._tokens.append(token)
        stopped = token.id in self.stop_ids
        text = "" if stopped or self._text is None else self._text.push(token.id)
        if text:
            self._write(self._stops.push(text))
        if stopped or self._stops.found or len(self._tokens) >= self.num_new_tokens:
            self._end(stopped)
            return True
        return False

    def fail(self, fault: Exception) -> None:
        """End with an error. Does nothing for a row that has ended."""
        if not (self.is_canceled or self.has_ended):
            self.has_ended = True
            self._deliver(fault)

    def end(self, *, stopped: bool = False) -> None:
        """End here, as if the limit were reached, or with `stopped` as if the last token had stopped the answer."""
        self._end(stopped)

    def _end(self, stopped: bool) -> None:
        found = self._stops.found
        if not found:
            rest = "" if self._text is None else self._text.finish()
            text = self._stops.push(rest) if rest else ""
            found = self._stops.found
            self._write(text if found else text + self._stops.finish(), is_last=True)
        else:
            self._write("", is_last=True)
        answer = Answer(
            text="".join(self._written),
            num_prompt_tokens=len(self.prompt_ids),
            num_new_tokens=len(self._tokens),
            finish_reason="stop" if stopped or found else "length",
            tokens=tuple(self._tokens),
            prompt_tokens=self.prompt_tokens,
        )
        if not self.is_canceled:
            self.has_ended = True
            self._deliver(answer)

    def _write(self, text: str, is_last: bool = False) -> None:
        """Deliver text that is final, with the tokens since the last piece."""
        tokens = tuple(self._tokens[self._num_delivered :])
        if self.is_canceled or not (text or (is_last and tokens)):
            return
        self._written.append(text)
        self._num_delivered = len(self._tokens)
        self._deliver(Piece(text, tokens))


def new_row(
    prompt_ids: Sequence[int],
    settings: Settings,
    *,
    num_positions: int | None,
    stop_ids: Collection[int],
    tokenizer: "PreTrainedTokenizerBase",
    deliver: "Callable[[Delivery], None]",
) -> Row:
    """A row for a model that takes `num_positions` tokens. Raises `InvalidInput` if there is no room for an answer."""
    num_new_tokens = settings.num_new_tokens(len(prompt_ids), num_positions)
    scores_only = settings.prompt_logprobs and (num_positions is None or len(prompt_ids) <= num_positions)
    if num_new_tokens <= 0 and not scores_only:
        reason = (
            f"the model takes {num_positions}; start a new conversation"
            if num_positions is not None and len(prompt_ids) >= num_positions
            else f"max_length is {settings.max_length}; raise it or set max_new_tokens"
        )
        raise InvalidInput(f"no room for an answer: the prompt has {len(prompt_ids)} tokens and {reason}")
    return Row(
        prompt_ids,
        settings,
        num_new_tokens=num_new_tokens,
        stop_ids=stop_ids,
        tokenizer=tokenizer,
        deliver=deliver,
    )


def scored(token_id: int, logits: Tensor, num_logprobs: int | None) -> Token:
    """The token with the log-probabilities that were asked for, from the raw (V,) logits."""
    if num_logprobs is None:
        return Token(token_id)
    logprobs = logits.float().log_softmax(-1)
    best: Any = logprobs.topk(min(num_logprobs, len(logprobs)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Token(token_id, float(logprobs[token_id]), top)
