"""Batches of the model's own answers, in the place of batches of rows: what ppo and grpo learn from.

An optimizer step number n (from 0) learns from the rollout n // (num_batches num_passes). Its prompts are a part of one
endless row of shuffled epochs, and its random numbers start from a seed made of its number, so that a run that was
stopped goes on as one that was not. Answers that are still to be learned from lie in the checkpoint. Where the stage
takes given answers for a share of the rollouts, a number drawn from a seed of the same kind says which they are.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.core.errors import RunFailed
from luthier.data.collate import model_inputs
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.model.heads.output_head import token_logps
from luthier.model.heads.value_head import load_value_head, logps_and_values
from luthier.stages._rollout import Experience, Rollout
from luthier.training.scorers import Answered, WeightedScorers

if TYPE_CHECKING:
    import datasets
    from torch import Tensor, nn
    from transformers import TrainingArguments

    from luthier.training.trainer import StageTrainer

Generate = Callable[["nn.Module", Sequence[Sequence[int]], Sequence[int]], list[list[int]]]
"""(model, prompts, a seed for each) -> the ids of the answers, with the token that ended each."""
Decode = Callable[[Sequence[int], bool], str]
"""(ids, with special tokens) -> text."""
EXPERIENCE_FILE = "experience_{}.pt"
"""The answers of one process that are still to be learned from, in a checkpoint."""


class StepRows(torch.utils.data.Dataset):
    """As many rows as an epoch learns from; what they are is decided when they are asked for."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> int:
        return index


def numbers_or_batch(
    rows: Sequence[Any], collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
) -> list[int] | dict[str, Any]:
    """The numbers of `StepRows` as they are; rows of an evaluation as a batch."""
    return list(rows) if isinstance(rows[0], int) else collate(rows)


@dataclass(slots=True)
class Rollouts:
    """The rollouts of one run."""

    plan: Rollout
    prompts: "datasets.Dataset"
    """Rows of `input_ids`, the prompt and then the given answer, which alone has labels."""
    generate: Generate
    decode: Decode
    scorers: WeightedScorers | None
    """None where the stage judges nothing."""
    stop_ids: frozenset[int]
    temperature: float
    max_new_tokens: int
    seed: int
    shuffles: bool = True
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The answers of this process in the rollout that is being learned from: `input_ids`, `labels`, `units` and what
    the stage judged of each token."""

    def num_rows_of_epoch(self, trainer: "StageTrainer") -> int:
        """How many rows all processes together learn from while they see each prompt once; whole steps."""
        args = trainer.args
        of_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        answers = len(self.prompts) * self.plan.num_generations
        return max(answers // of_step, 1) * of_step * self.plan.num_passes

    def batches(self, trainer: "StageTrainer", num_batches: int) -> list[dict[str, Any]]:
        """What the optimizer step that comes next learns from, cut into `num_batches`."""
        size, num_steps = trainer.args.train_batch_size, self.plan.num_batches
        number, place = divmod(trainer.state.global_step, num_steps * self.plan.num_passes)
        if place == 0 or not self.rows:
            self.rows = self._collect(trainer, number)
        of_step = len(self.rows) // num_steps
        start = place % num_steps * of_step
        mine = self.rows[start : start + of_step]
        return [self._batch(trainer, mine[first : first + size]) for first in range(0, num_batches * size, size)]

    def _batch(self, trainer: "StageTrainer", rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = trainer.collate([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
        columns = {name: torch.cat([row["columns"][name] for row in rows]) for name in rows[0]["columns"]}
        return {**batch, **columns, "units": sum(row["units"] for row in rows), "temperature": self.temperature}

    def _collect(self, trainer: "StageTrainer", number: int) -> list[dict[str, Any]]:
        """Rollout `number`: the answers, and what the stage makes of them."""
        is_own, places = self.is_own(number), self.places(number, trainer.args)
        prompts = [self._parted(index) for index in self._asked(places) for _ in range(self.plan.num_generations)]
        given = [answer for _, answer in prompts]
        answers = self._own(trainer, [prompt for prompt, _ in prompts], places) if is_own else given
        rows: list[dict[str, Any]] = [
            {"input_ids": [*prompt, *answer], "labels": [IGNORE_INDEX] * len(prompt) + answer}
            for (prompt, _), answer in zip(prompts, answers, strict=True)
        ]
        if self.plan.own_share < 1:
            trainer.add_metrics({"own_answers": (torch.tensor(float(is_own)), 1.0)})
        if self.scorers is None:
            return [{**row, "units": len(answer), "columns": {}} for row, answer in zip(rows, answers, strict=True)]
        answered = [self._answered(*prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return self._judged(trainer, rows, answered, self.scorers)

    def is_own(self, number: int) -> bool:
        """Whether the answers of rollout `number` are the policy's own, on all processes alike."""
        return random.Random(f"own answers {self.seed} {number}").random() < self.plan.own_share

    def answer_seeds(self, places: Sequence[int]) -> list[int]:
        """One for each answer to the prompts at `places`: of the run, the place and the number in its group alone."""
        size = self.plan.num_generations
        names = [f"answer {self.seed} {place * size + number}" for place in places for number in range(size)]
        return [random.Random(name).getrandbits(63) for name in names]

    def _own(self, trainer: "StageTrainer", prompts: Sequence[list[int]], places: Sequence[int]) -> list[list[int]]:
        """What the policy answers."""
        with trainer.compute_loss_context_manager():
            answers = self.generate(trainer.policy, prompts, self.answer_seeds(places))
        for prompt, answer in zip(prompts, answers, strict=True):
            if not answer:
                raise RunFailed(
                    f"a prompt of {len(prompt)} tokens leaves the model no room for an answer: "
                    f" {self.decode(prompt, True)[:80]!r} -> lower cutoff_len"
                )
        count = float(len(answers))
        trainer.add_metrics(
            {
                "answer_tokens": (torch.tensor(float(sum(map(len, answers)))), count),
                "finished_answers": (torch.tensor(float(sum(a[-1] in self.stop_ids for a in answers))), count),
            }
        )
        return answers

    def _judged(
        self,
        trainer: "StageTrainer",
        rows: Sequence[dict[str, Any]],
        answered: Sequence[Answered],
        scorers: WeightedScorers,
    ) -> list[dict[str, Any]]:
        """The rows with scores, log-probabilities, and what the stage makes of them."""
        assert self.plan.judge is not None, "there are scorers because it asks for scores"
        scores, each = scorers(answered)
        experience = self._measured(trainer, rows, torch.tensor(scores, dtype=torch.float64), answered)
        judged = self.plan.judge(
            experience,
            trainer.stage_config,
            state=trainer.stage_state,
            totals=trainer._over_processes,
            max_new_tokens=self.max_new_tokens,
        )
        trainer.stage_state = judged.state
        count = float(len(scores))
        rewards = {f"rewards/{name.rpartition('/')[2]}": (torch.tensor(s).sum(), count) for name, s in each.items()}
        trainer.add_metrics({"reward": (experience.scores.sum(), count), **rewards, **judged.metrics})
        lengths = experience.lengths.tolist()
        parted = {name: column.split(lengths) for name, column in judged.columns.items()}
        return [
            {**row, "units": units, "columns": {name: column[index].clone() for name, column in parted.items()}}
            for index, (row, units) in enumerate(zip(rows, judged.units.tolist(), strict=True))
        ]

    def places(self, number: int, args: "TrainingArguments") -> list[int]:
        """Which prompts rollout `number` asks on this process, counted over the whole run and all processes.

        Those of one optimizer step stand together, each process with its part of them: however many processes share a
        step, it learns from the same answers.
        """
        of_step = args.train_batch_size * args.gradient_accumulation_steps // self.plan.num_generations
        steps = range(number * self.plan.num_batches, (number + 1) * self.plan.num_batches)
        starts = [(step * args.world_size + args.process_index) * of_step for step in steps]
        return [start + place for start in starts for place in range(of_step)]

    def _asked(self, places: Sequence[int]) -> list[int]:
        """The prompts at these places: each epoch asks all of them once, in an order of its own."""
        parted = [divmod(place, len(self.prompts)) for place in places]
        orders = {epoch: self._order(epoch) for epoch in {epoch for epoch, _ in parted}}
        return [orders[epoch][place] for epoch, place in parted]

    def _order(self, epoch: int) -> Sequence[int]:
        if not self.shuffles:
            return range(len(self.prompts))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(len(self.prompts), generator=generator).tolist()

    def _parted(self, index: int) -> tuple[list[int], list[int]]:
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

    def _measured(
        self,
        trainer: "StageTrainer",
        rows: Sequence[Mapping[str, Any]],
        scores: "Tensor",
        answered: Sequence[Answered],
    ) -> Experience:
        """The scores, and what policy, value head and reference say of the answers as they are now."""
        device = trainer.args.device
        parts = self._asked_of_models(trainer, rows) if self.plan.asks_policy else {}
        lengths = torch.tensor([len(one.answer_ids) for one in answered], device=device)
        return Experience(
            scores=scores.to(device),
            stopped=torch.tensor([one.stopped for one in answered], device=device),
            rows=torch.arange(len(rows), device=device).repeat_interleave(lengths),
            **{name: torch.cat(parts[name]) if parts.get(name) else None for name in ("logps", "reference", "values")},
        )

    def _asked_of_models(
        self, trainer: "StageTrainer", rows: Sequence[Mapping[str, Any]]
    ) -> "Mapping[str, list[Tensor]]":
        """`logps`, `reference` and `values` of all answers, batch by batch."""
        size = trainer.args.train_batch_size
        parts: dict[str, list[Tensor]] = {"logps": [], "reference": [], "values": []}
        policy, head = trainer.policy, trainer.head
        was_training = policy.training
        policy.eval()
        for start in range(0, len(rows), size):
            batch = trainer._prepare_inputs(trainer.collate(rows[start : start + size]))
            where = (model_inputs(batch), batch["positions"], batch["targets"])
            with torch.no_grad(), trainer.compute_loss_context_manager():
                if self.plan.has_values:
                    logps, values = logps_and_values(policy, head, *where, temperature=self.temperature)
                    parts["values"].append(values)
                else:
                    logps, _ = token_logps(policy, head, *where, temperature=self.temperature)
                parts["logps"].append(logps)
                if "reference" in trainer.companions:
                    reference = trainer.companions["reference"]
                    with reference.asked() as network:
                        asked, _ = token_logps(network, reference.head, *where, temperature=self.temperature)
                    parts["reference"].append(asked)
        policy.train(was_training)
        return parts

    def save(self, folder: Path, trainer: "StageTrainer") -> None:
        if self._is_inside(trainer):
            torch.save(self.rows, folder / EXPERIENCE_FILE.format(trainer.args.process_index))

    def load(self, folder: Path, trainer: "StageTrainer") -> None:
        if self.plan.has_values:
            load_value_head(trainer.policy, folder)
        path = folder / EXPERIENCE_FILE.format(trainer.args.process_index)
        if path.is_file():
            self.rows = torch.load(path, weights_only=True)

    def _is_inside(self, trainer: "StageTrainer") -> bool:
        """Whether the latest rollout is still to be learned from."""
        return trainer.state.global_step % (self.plan.num_batches * self.plan.num_passes) != 0
