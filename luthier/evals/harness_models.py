"""Models as lm-evaluation-harness takes them: a loaded model with luthier's scorer, and answers that were saved.

Only `task: harness/...` imports this file, since it needs the extra `harness`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM

from luthier.evals.scorer import DEFAULT_LENGTH, encode, encode_pair, prefix_token_id, rolling_pairs

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from luthier.evals.model import EvalModel

DEFAULT_NEW_TOKENS = 256
"""The longest answer where a task does not say; the harness has the same number."""
Key = tuple[str, int, int]
"""Task, document, number of the request for that document."""


class ScoredModel(LM):
    """A loaded model. Prompts are the texts of the task, without chat format."""

    def __init__(self, model: "EvalModel") -> None:
        super().__init__()
        self.model, self.tokenizer = model, model.tokenizer

    def loglikelihood(self, requests: "Sequence[Instance]") -> list[tuple[float, bool]]:
        pairs = [encode_pair(self.tokenizer, *request.args) for request in requests]
        return [(score.logprob, score.is_greedy) for score in self.model.scorer.scores(pairs)]

    def loglikelihood_rolling(self, requests: "Sequence[Instance]") -> list[float]:
        scorer, prefix = self.model.scorer, prefix_token_id(self.tokenizer)
        windows = [
            rolling_pairs(encode(self.tokenizer, text), prefix, scorer.max_length)
            for text in (request.args[0] for request in requests)
        ]
        scores = iter(scorer.scores([pair for pairs in windows for pair in pairs]))
        return [sum(next(scores).logprob for _ in pairs) for pairs in windows]

    def generate_until(self, requests: "Sequence[Instance]") -> list[str]:
        answers: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda number: repr(requests[number].args[1]))
        for _, group in groupby(order, key=lambda number: repr(requests[number].args[1])):
            numbers = list(group)
            contexts = [requests[number].args[0] for number in numbers]
            answers |= dict(zip(numbers, self._answers(contexts, requests[numbers[0]].args[1]), strict=True))
        return [answers[number] for number in range(len(requests))]

    def _answers(self, contexts: Sequence[str], wanted: Mapping[str, Any]) -> list[str]:
        """`wanted`: the generation settings of the task. Answers are greedy unless they say otherwise."""
        until = wanted.get("until") or []
        stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
        num_new = int(wanted.get("max_gen_toks", DEFAULT_NEW_TOKENS))
        settings = replace(
            self.model.settings,
            do_sample=bool(wanted.get("do_sample", False)),
            temperature=float(wanted.get("temperature") or 1.0),
            top_p=float(wanted.get("top_p", 1.0)),
            top_k=int(wanted.get("top_k", 0)),
            repetition_penalty=1.0,
            num_beams=1,
            max_new_tokens=num_new,
            stop=stops,
        )
        room = (self.model.num_positions or DEFAULT_LENGTH) - num_new
        prompts = [encode(self.tokenizer, context)[-max(room, 1) :] for context in contexts]
        found = self.model.answer_ids(prompts, settings)
        texts = [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]
        return [cut_at(text, stops) for text in texts]


class SavedAnswers(LM):
    """Gives the answers of an evaluation that is finished, so that the harness computes its metrics from them."""

    def __init__(self, answers: Mapping[Key, Sequence[Any]]) -> None:
        super().__init__()
        self._left = {key: iter(values) for key, values in answers.items()}

    def loglikelihood(self, requests: "Sequence[Instance]") -> list[tuple[float, bool]]:
        return [(logprob, is_greedy) for logprob, is_greedy in map(self._next, requests)]

    def loglikelihood_rolling(self, requests: "Sequence[Instance]") -> list[float]:
        return [self._next(request) for request in requests]

    def generate_until(self, requests: "Sequence[Instance]") -> list[str]:
        return [self._next(request) for request in requests]

    def _next(self, request: "Instance") -> Any:
        assert request.task_name is not None and request.doc_id is not None
        return next(self._left[request.task_name, request.doc_id, request.idx])


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of these."""
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]
