"""Rollouts: batches of sampled answers instead of batches of rows, for ppo, grpo and on-policy gkd.

Optimizer step n (from 0) uses rollout n // (num_batches num_passes). Its prompts are a slice of one endless sequence of
shuffled epochs, and its seed is derived from its number, so a resumed run continues like an uninterrupted one. Answers
that later steps still need are saved in the checkpoint. If a share of the rollouts uses the answers of the dataset, a
seed of the same kind decides which ones.
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
from luthier.data.rows.columns import BLOCKS, IMAGES
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.data.rows.table import Table
from luthier.model.heads.output_head import token_logps
from luthier.model.heads.value_head import load_value_head, logps_and_values
from luthier.model.types import Models
from luthier.stages import StageState, Sums
from luthier.stages._rollout import Experience, Rollout, RolloutTargets
from luthier.training.distributed.sums import Collate, add_to, batch_by_batch, over_processes
from luthier.training.rewards import Answered, WeightedRewards, titles

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import TrainingArguments

Generate = Callable[["nn.Module", Sequence[Mapping[str, Any]], Sequence[int]], list[list[int]]]
"""(model, rows of prompts, one seed per prompt) -> token ids of the answers, stop token included."""
Decode = Callable[[Sequence[int], bool], str]
"""(ids, whether to keep special tokens) -> text."""
EXPERIENCE_FILE = "experience_{}.pt"
"""In a checkpoint: the answers of one process that later steps still need."""


class StepRows(torch.utils.data.Dataset):
    """Placeholder rows, one index per answer of an epoch; the answers themselves are made when a step needs them."""

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
    prompts: Table
    """Rows of `input_ids`: the prompt and then the answer of the dataset, which alone is labeled."""
    generate: Generate
    decode: Decode
    rewards: WeightedRewards | None
    """None if the stage needs no scores."""
    stop_ids: frozenset[int]
    temperature: float
    max_new_tokens: int
    shuffles: bool = True
    rows: list[dict[str, Any]] = field(default_factory=list)
    """This process's answers in the current rollout: `input_ids`, `labels`, `units` and the targets of each token."""

    @property
    def step_rows(self) -> StepRows:
        """One index per answer of all processes in one pass over the prompts, rounded down to whole steps."""
        args = self.args
        of_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        answers = len(self.prompts) * self.plan.num_generations
        return StepRows(max(answers // of_step, 1) * of_step * self.plan.num_passes)

    def numbers_or_batch(self, rows: Sequence[Any]) -> list[int] | dict[str, Any]:
        """The indices of `StepRows` unchanged; evaluation rows as a batch."""
        return list(rows) if isinstance(rows[0], int) else self.collate(rows)

    def step(self, number: int, num_batches: int, state: StageState) -> StepBatches:
        """The `num_batches` micro-batches of optimizer step `number`. Collects a new rollout when one is needed."""
        metrics: dict[str, tuple[Tensor, float | Tensor]] = {}
        rollout, index = divmod(number, self.plan.num_batches * self.plan.num_passes)
        if index == 0 or not self.rows:
            self.rows, state = self._collect(rollout, state, metrics)
        of_step, size = len(self.rows) // self.plan.num_batches, self.args.train_batch_size
        start = index % self.plan.num_batches * of_step
        mine = self.rows[start : start + of_step]
        batches = [self._batch(mine[first : first + size]) for first in range(0, num_batches * size, size)]
        return StepBatches(batches, state, metrics)

    def _batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        names = [name for name in rows[0] if name not in ("units", "columns")]
        batch = self.collate([{name: row[name] for name in names} for row in rows])
        columns = {name: torch.cat([row["columns"][name] for row in rows]) for name in rows[0]["columns"]}
        return {**batch, **columns, "units": sum(row["units"] for row in rows), "temperature": self.temperature}

    def _collect(
        self, number: int, state: StageState, metrics: "dict[str, tuple[Tensor, float | Tensor]]"
    ) -> tuple[list[dict[str, Any]], StageState]:
        """The answers of rollout `number` with their targets, and the state after it. Adds to `metrics`."""
        is_sampled, places = self.is_sampled(number), self.places(number)
        prompts = [self._split(index) for index in self._rows_at(places) for _ in range(self.plan.num_generations)]
        given = [answer for _, answer in prompts]
        answers = self._generated([prompt for prompt, _ in prompts], places, metrics) if is_sampled else given
        rows: list[dict[str, Any]] = [
            {
                **prompt,
                "input_ids": [*prompt["input_ids"], *answer],
                "labels": [IGNORE_INDEX] * len(prompt["input_ids"]) + answer,
            }
            for (prompt, _), answer in zip(prompts, answers, strict=True)
        ]
        if self.plan.sampled_share < 1:
            add_to(metrics, {"own_answers": (torch.tensor(float(is_sampled)), 1.0)})
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

    def is_sampled(self, number: int) -> bool:
        """Whether the answers of rollout `number` are sampled from the policy; the same on all processes."""
        return random.Random(f"own answers {self.args.seed} {number}").random() < self.plan.sampled_share

    def answer_seeds(self, places: Sequence[int]) -> list[int]:
        """One seed per answer to the prompts at `places`, from the run's seed, the place and the index in its group."""
        size = self.plan.num_generations
        names = [f"answer {self.args.seed} {place * size + number}" for place in places for number in range(size)]
        return [random.Random(name).getrandbits(63) for name in names]

    def _generated(
        self,
        prompts: Sequence[Mapping[str, Any]],
        places: Sequence[int],
        metrics: "dict[str, tuple[Tensor, float | Tensor]]",
    ) -> list[list[int]]:
        """Answers sampled from the policy. Raises `RunFailed` for a prompt that leaves no room for one."""
        answers = self.generate(self.models.policy, prompts, self.answer_seeds(places))
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = prompt["input_ids"]
            if not answer:
                raise RunFailed(
                    f"a prompt of {len(ids)} tokens leaves the model no room for an answer:"
                    f" {self.decode(ids, True)[:80]!r} -> lower cutoff_len"
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
        metrics: "dict[str, tuple[Tensor, float | Tensor]]",
    ) -> RolloutTargets:
        """Scores the answers and computes their advantages."""
        assert self.plan.advantages is not None, "only stages that need scores have rewards"
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
        parts = {f"rewards/{title}": (torch.tensor(each[name]).sum(), count) for name, title in titles(each).items()}
        add_to(metrics, {"reward": (experience.scores.sum(), count), **parts, **targets.metrics})
        return targets

    def places(self, number: int) -> list[int]:
        """This process's prompts of rollout `number`, as positions in the prompt sequence of the whole run.

        The prompts of one optimizer step are adjacent and split over the processes, so a step trains on the same
        answers for any number of processes.
        """
        args = self.args
        of_step = args.train_batch_size * args.gradient_accumulation_steps // self.plan.num_generations
        steps = range(number * self.plan.num_batches, (number + 1) * self.plan.num_batches)
        starts = [(step * args.world_size + args.process_index) * of_step for step in steps]
        return [start + place for start in starts for place in range(of_step)]

    def _rows_at(self, places: Sequence[int]) -> list[int]:
        """Indices of the prompts at these places: each epoch uses every prompt once, in its own order."""
        split = [divmod(place, len(self.prompts)) for place in places]
        orders = {epoch: self._order(epoch) for epoch in {epoch for epoch, _ in split}}
        return [orders[epoch][place] for epoch, place in split]

    def _order(self, epoch: int) -> Sequence[int]:
        if not self.shuffles:
            return range(len(self.prompts))
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        generator = torch.Generator().manual_seed(seed + epoch)
        return torch.randperm(len(self.prompts), generator=generator).tolist()

    def _split(self, index: int) -> tuple[dict[str, Any], list[int]]:
        """(prompt as a row with its images, if it has some; token ids of the answer of the dataset)."""
        row = self.prompts[index]
        ids, labels = row["input_ids"], row["labels"]
        length = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(ids))
        prompt = {name: row[name] for name in (IMAGES.name, BLOCKS.name) if name in row}
        return {**prompt, "input_ids": list(ids[:length])}, list(ids[length:])

    def _answered(self, prompt: Mapping[str, Any], given: list[int], answer: list[int]) -> Answered:
        ids = prompt["input_ids"]
        return Answered(
            prompt_ids=ids,
            answer_ids=answer,
            prompt=self.decode(ids, False),
            answer=self.decode(answer, False),
            given=self.decode(given, False),
            text=self.decode([*ids, *answer], True),
            stopped=answer[-1] in self.stop_ids,
            media=tuple(prompt.get(IMAGES.name, ())),
            blocks=tuple(prompt.get(BLOCKS.name, ())),
        )

    def _experience(
        self, rows: Sequence[Mapping[str, Any]], scores: "Tensor", answered: Sequence[Answered]
    ) -> Experience:
        """The scores, and the current log-probabilities and values of the answers."""
        device = self.args.device
        columns = self._columns(rows) if self.plan.needs_policy_logps else {}
        lengths = torch.tensor([len(one.answer_ids) for one in answered], device=device)
        return Experience(
            scores=scores.to(device),
            rows=torch.arange(len(rows), device=device).repeat_interleave(lengths),
            logps=columns.get("logps"),
            reference=columns.get("reference"),
            values=columns.get("values"),
        )

    def _columns(self, rows: Sequence[Mapping[str, Any]]) -> "dict[str, Tensor]":
        """`logps`, `reference` and `values` (K,) of the answer tokens, as far as the stage needs them."""
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
        """Save a rollout that later steps still need to the checkpoint. `num_steps`: steps done so far."""
        if num_steps % (self.plan.num_batches * self.plan.num_passes):
            torch.save(self.rows, folder / EXPERIENCE_FILE.format(self.args.process_index))

    def load(self, folder: Path) -> None:
        if self.plan.has_values:
            load_value_head(self.models.policy, folder)
        path = folder / EXPERIENCE_FILE.format(self.args.process_index)
        if path.is_file():
            device = self.args.device
            # torch does not know the `cpu:0` of a process that shares a run.
            where = "cpu" if device.type == "cpu" else device
            self.rows = torch.load(path, map_location=where, weights_only=True)
