"""What answers are worth: Python functions of the user, a reward model, a server. What they give is checked.

Every scorer takes the answers of one rollout (of one process) and gives one finite number for each.
"""

import importlib
import importlib.util
import inspect
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from luthier.core.errors import InvalidInput, RunFailed
from luthier.core.log import warn
from luthier.model.heads.score_head import position_scores

if TYPE_CHECKING:
    from torch import nn

TIMEOUT_SECONDS, NUM_ATTEMPTS, PAUSE_SECONDS = 60.0, 3, 1.0


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer of the policy."""

    prompt_ids: list[int]
    answer_ids: list[int]
    """The token that ended it included."""
    prompt: str
    """Without special tokens, as the answer is."""
    answer: str
    given: str
    """The answer that the data give, or empty."""
    text: str
    """Prompt and answer with their special tokens."""
    stopped: bool
    """Whether it came to its end, and was not cut off at `max_new_tokens`."""


class Scorer(Protocol):
    @property
    def name(self) -> str: ...

    def __call__(self, answers: Sequence[Answered]) -> list[float]: ...


@dataclass(frozen=True, slots=True)
class FunctionScorer:
    """`reward_funcs`: called with those of `prompts`, `completions`, `answers` that it has parameters for."""

    name: str
    function: Callable[..., Any]

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        offered = {
            "prompts": [answered.prompt for answered in answers],
            "completions": [answered.answer for answered in answers],
            "answers": [answered.given for answered in answers],
        }
        parameters = inspect.signature(self.function).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        taken = {name: texts for name, texts in offered.items() if takes_all or name in parameters}
        with ThreadPoolExecutor(max_workers=1) as thread:  # whatever the function raises, it is told as one error
            result = thread.submit(lambda: self.function(**taken))
            fault = result.exception()
        if fault is not None:
            raise RunFailed(
                f"reward_funcs: {self.name}: it raised {type(fault).__name__}: {fault}"
                f" -> call it with completions={offered['completions'][:1]!r} to see why"
            ) from fault
        return checked(f"reward_funcs: {self.name}", result.result(), answers)


def checked(who: str, scores: Any, answers: Sequence[Answered]) -> list[float]:
    """One finite number for each answer. Raises `RunFailed` that names `who` and the row."""
    if isinstance(scores, torch.Tensor):
        scores = scores.tolist()
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        raise RunFailed(f"{who}: it gave a {type(scores).__name__} -> return a list with one number for each answer")
    if len(scores) != len(answers):
        raise RunFailed(f"{who}: it gave {len(scores)} scores for {len(answers)} answers -> return one for each")
    for number, (score, answered) in enumerate(zip(scores, answers, strict=True)):
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise RunFailed(
                f"{who}: its score of answer {number} is {score!r}, not a finite number; prompt"
                f" {answered.prompt[-80:]!r}, answer {answered.answer[:80]!r}"
            )
    return [float(score) for score in scores]


def load_function(name: str) -> FunctionScorer:
    """`file.py:function` or `module:function`. Raises `InvalidInput`."""
    source, _, function_name = name.rpartition(":")
    path = Path(source).expanduser()
    key = f"reward_funcs: {name}"
    if path.suffix == ".py":
        if not path.is_file():
            raise InvalidInput(f"{key}: there is no file {path} -> correct the path (it counts from {Path.cwd()})")
        spec = importlib.util.spec_from_file_location(f"luthier_reward_{path.stem}", path)
        assert spec is not None and spec.loader is not None, "a .py file has a loader"
        module = importlib.util.module_from_spec(spec)
        loader: Any = spec.loader
        load: Callable[[], Any] = lambda: loader.exec_module(module)  # noqa: E731
    else:
        load = lambda: importlib.import_module(source)  # noqa: E731
    with ThreadPoolExecutor(max_workers=1) as thread:
        result = thread.submit(load)
        fault = result.exception()
    if fault is not None:
        raise InvalidInput(f"{key}: {source} cannot be imported ({type(fault).__name__}: {fault})") from fault
    found = vars(module if path.suffix == ".py" else result.result()).get(function_name)
    if not callable(found):
        raise InvalidInput(f"{key}: {source} has no function {function_name} -> correct the name")
    return FunctionScorer(name, found)


@dataclass(frozen=True, slots=True)
class ModelScorer:
    """A reward model of its own beside the policy: it takes the memory of another model of its size."""

    name: str
    model: "nn.Module"
    closing_ids: tuple[int, ...]
    """What the chat format writes behind the token that ends an answer, as the reward model was trained."""

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        scores = []
        device = next(self.model.parameters()).device
        with torch.no_grad():
            for answered in answers:
                closing = self.closing_ids if answered.stopped else ()
                ids = torch.tensor([[*answered.prompt_ids, *answered.answer_ids, *closing]], device=device)
                scores.append(position_scores(self.model, {"input_ids": ids})[-1].item())
        return checked(f"reward_model: {self.name}", scores, answers)


@dataclass(frozen=True, slots=True)
class ServerScorer:
    """POST {"model": "model", "messages": [text, ...]} -> {"scores": [number, ...]}."""

    name: str
    timeout_seconds: float = TIMEOUT_SECONDS
    pause_seconds: float = PAUSE_SECONDS

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        who = f"reward_model: {self.name}"
        body = json.dumps({"model": "model", "messages": [answered.text for answered in answers]}).encode()
        content = self._ask(who, body)
        if not isinstance(content, Mapping) or "scores" not in content:
            raise RunFailed(f'{who}: the answer has no "scores": {str(content)[:200]} -> check the address')
        return checked(who, content["scores"], answers)

    def _ask(self, who: str, body: bytes) -> Any:
        from urllib.error import HTTPError
        from urllib.request import Request, urlopen

        request = Request(self.name, data=body, headers={"Content-Type": "application/json"})
        reason = ""
        for attempt in range(1, NUM_ATTEMPTS + 1):
            try:
                with urlopen(request, timeout=self.timeout_seconds) as response:
                    return json.loads(response.read())
            except HTTPError as fault:
                reason = f"status {fault.code}: {fault.read()[:200].decode(errors='replace')}"
                if fault.code < 500:
                    break
            except (OSError, ValueError) as fault:  # no connection, too slow, or no JSON
                reason = str(fault)
            if attempt < NUM_ATTEMPTS:
                warn(f"{who}: attempt {attempt} of {NUM_ATTEMPTS} failed ({reason})")
                time.sleep(self.pause_seconds * attempt)
        raise RunFailed(f"{who}: no scores ({reason}); what was saved before stays -> check the server")


@dataclass(frozen=True, slots=True)
class WeightedScorers:
    """sum_i w_i s_i."""

    scorers: Sequence[Scorer]
    weights: Sequence[float]

    def __call__(self, answers: Sequence[Answered]) -> tuple[list[float], dict[str, list[float]]]:
        """The sum for each answer, and the scores of each scorer if there are several."""
        each = {scorer.name: scorer(answers) for scorer in self.scorers}
        columns = zip(*each.values(), strict=True)
        sums = [sum(w * s for w, s in zip(self.weights, scores, strict=True)) for scores in columns]
        return sums, each if len(each) > 1 else {}
