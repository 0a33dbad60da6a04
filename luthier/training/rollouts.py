"""Batches of the policy's own answers, in the place of batches of rows: what ppo and grpo are trained on.

Optimizer step n (from 0) uses rollout n // (num_batches num_passes). Its prompts are a slice of one endless sequence of
shuffled epochs, and its random numbers start from a seed made of its number, so a run that was stopped continues like
one that was not. Answers that later steps still need are saved in the checkpoint. Where the stage takes given answers
for a share of the rollouts, a number drawn from a seed of the same kind says which those are.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.core.errors import RunFailed
from luthier.data.collate import model_inputs
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.model.heads.output_head import token_logps
from luthier.model.heads.value_head import load_value_head, logps_and_values
from luthier.model.types import Models
from luthier.stages import StageState, Sums
from luthier.stages._rollout import Experience, Rollout, RolloutTargets
from luthier.training.distributed import Collate, add_to, batch_by_batch, over_processes
from luthier.training.rewards import Answered, WeightedRewards

if TYPE_CHECKING:
    import datasets
    from torch import Tensor, nn
    from transformers import TrainingArguments

Generate = Callable[["nn.Module", Sequence[Sequence[int]], Sequence[int]], list[list[int]]]
"""(model, prompts, a seed for each) -> the ids of the answers, with the token that ended each."""
Decode = Callable[[Sequence[int], bool], str]
"""(ids, with special tokens) -> text."""
EXPERIENCE_FILE = "experience_{}.pt"
"""The answers of one process that later steps still need, in a checkpoint."""


class StepRows(torch.utils.data.Dataset):
    """As many numbers as an epoch has answers; which answers they are is decided when a step asks for them."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> int:
        return index


@dataclass(frozen=True, slots=True)
class StepBatches:
    """What one optimizer step is trained on."""

    batches: list[dict[str, Any]]
    state: StageState
    metrics: Sums


@dataclass(slots=True, kw_only=True)
class Rollouts:
    """The rollouts of one run."""

    plan: Rollout
    config: Any
    """The keys of the stage."""
    models: Models
    args: "TrainingArguments"
    collate: Collate
    prompts: "datasets.Dataset"
    """Rows of `input_ids`, the prompt and then the given answer, which alone has labels."""
    generate: Generate
    decode: Decode
    rewards: WeightedRewards | None
    """None where the stage needs no scores."""
    stop_ids: frozenset[int]
    temperature: float
    max_new_tokens: int
    shuffles: bool = True
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The answers of this process in the current rollout: `input_ids`, `labels`, `units` and the targets of each
    token."""

    @property
    def step_rows(self) -> StepRows:
        """As many numbers as all processes together have answers while they see each prompt once; whole steps."""
        args = self.args
        of_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        answers = len(self.prompts) * self.plan.num_generations
        return StepRows(max(answers // of_step, 1) * of_step * self.plan.num_passes)

    def numbers_or_batch(self, rows: Sequence[Any]) -> list[int] | dict[str, Any]:
        """The numbers of `StepRows` as they are; rows of an evaluation as a batch."""
        return list(rows) if isinstance(rows[0], int) else self.collate(rows)

    def step(self, number: int, num_batches: int, state: StageState) -> StepBatches:
        """The `num_batches` batches of optimizer step `number`; a new rollout is made when the last one is used up."""
        metrics: dict[str, tuple[Tensor, float]] = {}
        rollout, place = divmod(number, self.plan.num_batches * self.plan.num_passes)
        if place == 0 or not self.rows:
            self.rows, state = self._collect(rollout, state, metrics)
        of_step, size = len(self.rows) // self.plan.num_batches, self.args.train_batch_size
        start = place % self.plan.num_batches * of_step
        mine = self.rows[start : start + of_step]
        batches = [self._batch(mine[first : first + size]) for first in range(0, num_batches * size, size)]
        return StepBatches(batches, state, metrics)

    def _batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collate([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
        columns = {name: torch.cat([row["columns"][name] for row in rows]) for name in rows[0]["columns"]}
        return {**batch, **columns, "units": sum(row["units"] for row in rows), "temperature": self.temperature}

    def _collect(
        self, number: int, state: StageState, metrics: "dict[str, tuple[Tensor, float]]"
    ) -> tuple[list[dict[str, Any]], StageState]:
        """Rollout `number`: the answers with their targets, and the state after it. Adds to `metrics`."""
        is_own, places = self.is_own(number), self.places(number)
        prompts = [self._split(index) for index in self._rows_at(places) for _ in range(self.plan.num_generations)]
        given = [answer for _, answer in prompts]
        answers = self._generated([prompt for prompt, _ in prompts], places, metrics) if is_own else given
        rows: list[dict[str, Any]] = [
            {"input_ids": [*prompt, *answer], "labels": [IGNORE_INDEX] * len(prompt) + answer}
            for (prompt, _), answer in zip(prompts, answers, strict=True)
        ]
        if self.plan.sampled_share < 1:
            add_to(metrics, {"own_answers": (torch.tensor(float(is_own)), 1.0)})
        if self.rewards is None:
            return [{**r, "units": len(a), "columns": {}} for r, a in zip(rows, answers, strict=True)], state
        answered = [self._answered(*prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        targets = self._targets(rows, answered, self.rewards, state, metrics)
        lengths = [len(answer) for answer in answers]
        columns = {name: column.split(lengths) for name, column in targets.columns.items()}
        rows = [
            {**row, "units": units, "columns": {name: column[index].clone() for name, column in columns.items()}}
            for index, (row, units) in enumerate(zip(rows, targets.units.tolist(), strict=True))
        ]
        return rows, targets.state

    def is_own(self, number: int) -> bool:
        """Whether the answers of rollout `number` are the policy's own, on all processes alike."""
        return random.Random(f"own answers {self.args.seed} {number}").random() < self.plan.sampled_share

    def answer_seeds(self, places: Sequence[int]) -> list[int]:
        """One for each answer to the prompts at `places`: of the run, the place and the number in its group alone."""
        size = self.plan.num_generations
        names = [f"answer {self.args.seed} {place * size + number}" for place in places for number in range(size)]
        return [random.Random(name).getrandbits(63) for name in names]

    def _generated(
        self, prompts: Sequence[list[int]], places: Sequence[int], metrics: "dict[str, tuple[Tensor, float]]"
    ) -> list[list[int]]:
        """The answers of the policy."""
        answers = self.generate(self.models.policy, prompts, self.answer_seeds(places))
        for prompt, answer in zip(prompts, answers, strict=True):
            if not answer:
                raise RunFailed(
                    f"a prompt of {len(prompt)} tokens leaves the model no room for an answer: "
                    f" {self.decode(prompt, True)[:80]!r} -> lower cutoff_len"
                )
        count = float(len(answers))
        finished = sum(answer[-1] in self.stop_ids for answer in answers)
        add_to(metrics, {"answer_tokens": (torch.tensor(float(sum(map(len, answers)))), count)})
        add_to(metrics, {"finished_answers": (torch.tensor(float(finished)), count)})
        return answers

    def _targets(
        self,
        rows: Sequence[dict[str, Any]],
        answered: Sequence[Answered],
        rewards: WeightedRewards,
        state: StageState,
        metrics: "dict[str, tuple[Tensor, float]]",
    ) -> RolloutTargets:
        """Scores, log-probabilities, and the advantages that the stage makes of them."""
        assert self.plan.advantages is not None, "there are rewards because it asks for scores"
        scores, each = rewards(answered)
        experience = self._experience(rows, torch.tensor(scores, dtype=torch.float64), answered)
        targets = self.plan.advantages(
            experience,
            self.config,
            state=state,
            totals=partial(over_processes, device=self.args.device),
            max_new_tokens=self.max_new_tokens,
        )
        count = float(len(scores))
        parts = {f"rewards/{name.rpartition('/')[2]}": (torch.tensor(s).sum(), count) for name, s in each.items()}
        add_to(metrics, {"reward": (experience.scores.sum(), count), **parts, **targets.metrics})
        return targets

    def places(self, number: int) -> list[int]:
        """The prompts of rollout `number` on this process, counted over the whole run and all processes.

        Those of one optimizer step stand together, each process with its part of them: however many processes share a
        step, it is trained on the same answers.
        """
        args = self.args
        of_step = args.train_batch_size * args.gradient_accumulation_steps // self.plan.num_generations
        steps = range(number * self.plan.num_batches, (number + 1) * self.plan.num_batches)
        starts = [(step * args.world_size + args.process_index) * of_step for step in steps]
        return [start + place for start in starts for place in range(of_step)]

    def _rows_at(self, places: Sequence[int]) -> list[int]:
        """The prompts at these places: each epoch uses all of them once, in an order of its own."""
        split = [divmod(place, len(self.prompts)) for place in places]
        orders = {epoch: self._order(epoch) for epoch in {epoch for epoch, _ in split}}
        return [orders[epoch][place] for epoch, place in split]

    def _order(self, epoch: int) -> Sequence[int]:
        if not self.shuffles:
            return range(len(self.prompts))
        generator = torch.Generator().manual_seed(self.args.seed + epoch)
        return torch.randperm(len(self.prompts), generator=generator).tolist()

    def _split(self, index: int) -> tuple[list[int], list[int]]:
        """(prompt, given answer)."""
        row = self.prompts[index]
        ids, labels = row["input_ids"], row["labels"]
        length = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(ids))
        return list(ids[:length]), list(ids[length:])

    def _answered(self, prompt: list[int], given: list[int], answer: list[int]) -> Answered:
        return Answered(
            prompt_ids=prompt,
            answer_ids=answer,
            prompt=self.decode(prompt, False),
            answer=self.decode(answer, False),
            given=self.decode(given, False),
            text=self.decode([*prompt, *answer], True),
            stopped=answer[-1] in self.stop_ids,
        )

    def _experience(
        self, rows: Sequence[Mapping[str, Any]], scores: "Tensor", answered: Sequence[Answered]
    ) -> Experience:
        """The scores, and what policy, value head and reference give for the answers as they are now."""
        device = self.args.device
        columns = self._columns(rows) if self.plan.needs_policy_logps else {}
        lengths = torch.tensor([len(one.answer_ids) for one in answered], device=device)
        return Experience(
            scores=scores.to(device),
            stopped=torch.tensor([one.stopped for one in answered], device=device),
            rows=torch.arange(len(rows), device=device).repeat_interleave(lengths),
            logps=columns.get("logps"),
            reference=columns.get("reference"),
            values=columns.get("values"),
        )

    def _columns(self, rows: Sequence[Mapping[str, Any]]) -> "dict[str, Tensor]":
        """`logps`, `reference` and `values` of all tokens of the answers, as far as the stage asks for them."""
        policy, head, size = self.models.policy, self.models.head, self.args.train_batch_size
        reference = self.models.frozen.get("reference")

        def compute(batch: dict[str, Any]) -> "dict[str, Tensor]":
            where = (model_inputs(batch), batch["positions"], batch["targets"])
            found: dict[str, Tensor] = {}
            if self.plan.has_values:
                found["logps"], found["values"] = logps_and_values(policy, head, *where, temperature=self.temperature)
            else:
                found["logps"], _ = token_logps(policy, head, *where, temperature=self.temperature)
            if reference is not None:
                with reference.running() as network:
                    found["reference"], _ = token_logps(network, reference.head, *where, temperature=self.temperature)
            return found

        batches = (self.collate(rows[start : start + size]) for start in range(0, len(rows), size))
        was_training = policy.training
        policy.eval()
        found = batch_by_batch(batches, self.args.device, compute)
        policy.train(was_training)
        return {name: torch.cat([columns[name] for columns in found]) for name in found[0]}

    def save(self, folder: Path, num_steps: int) -> None:
        """`num_steps`: of the run so far. A rollout that later steps still need goes into the checkpoint."""
        if num_steps % (self.plan.num_batches * self.plan.num_passes):
            torch.save(self.rows, folder / EXPERIENCE_FILE.format(self.args.process_index))

    def load(self, folder: Path) -> None:
        if self.plan.has_values:
            load_value_head(self.models.policy, folder)
        path = folder / EXPERIENCE_FILE.format(self.args.process_index)
        if path.is_file():
            self.rows = torch.load(path, weights_only=True)
