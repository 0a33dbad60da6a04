"""Every row of a run's datasets before the checks of the doctor. Rows that would stop training do not stop this."""

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from luthier.config.keys.hubs import HubTokens
from luthier.core.errors import DataError, MissingExtra, RowError
from luthier.core.kinds import CHECKS, FORMATS
from luthier.data.chat.encoder import TurnIds
from luthier.data.rows.encoding import Encoding
from luthier.data.rows.maker import Parts, encoded_rows, not_taken
from luthier.data.rows.row_plan import RowPlan
from luthier.data.rows.tokenize import Written, turn_ids
from luthier.data.sources.catalog import load_catalog
from luthier.data.sources.read import read_rows
from luthier.data.types import Media
from luthier.inspection.doctor import Check, CheckContext, Finding, Place, Sample, Split
from luthier.inspection.duplicates import ExactDuplicates, NearDuplicates

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.data.sources.dataset_info import DatasetSpec
    from luthier.data.sources.readers import Row
    from luthier.stages import Stage

BATCH_ROWS = 500
UNREADABLE = "unreadable_data"
"""The check of findings about a whole dataset: it cannot be read, or not to its end."""


@dataclass(slots=True)
class Examination:
    """What was seen on the way; complete when the last finding has been given."""

    num_rows: dict[Split, dict[str, int]] = field(default_factory=lambda: {"train": {}, "eval": {}})
    lengths: "dict[Split, array[int]]" = field(default_factory=lambda: {"train": array("L"), "eval": array("L")})
    """Tokens of every row before anything is cut off."""
    not_checked: dict[str, str] = field(default_factory=dict)
    """Check -> why it was left out."""

    def findings(self, run: "TrainRun", stage: "Stage", encoding: Encoding) -> Iterator[Finding]:
        """Every finding, row by row: first the training datasets, then those for evaluation."""
        packer = stage.rows.packer(run, encoding)
        if packer is not None and packer.cuts_rows:
            encoding = encoding.unlimited()
        context = context_of(run, encoding, has_targets=stage.rows.has_targets)
        checks: list[Check] = [CHECKS.get(name) for name in CHECKS.names]
        exact, near = ExactDuplicates(), self._near_twins()
        for sample in self._samples(run, stage, encoding):
            if isinstance(sample, Finding):
                yield sample
                continue
            if sample.example is not None:
                exact.note(sample)
                if near is not None:
                    near.note(sample)
            counts = self.num_rows[sample.split]
            counts[sample.dataset] = counts.get(sample.dataset, 0) + 1
            self.lengths[sample.split].extend(max(part.num_tokens for part in row) for row in sample.rows)
            for check in checks:
                yield from check.find(sample, context)

    def _near_twins(self) -> NearDuplicates | None:
        try:
            return NearDuplicates()
        except MissingExtra as missing:
            self.not_checked["near_duplicates"] = str(missing)
            return None

    def _samples(self, run: "TrainRun", stage: "Stage", encoding: Encoding) -> Iterator[Sample | Finding]:
        catalog = load_catalog(run.data.dataset_dir, run.data.media_dir, hf_hub_token=run.model.hf_hub_token)
        hub: dict[str, Any] = {"cache_dir": run.model.cache_dir, "tokens": HubTokens.of(run.model)}
        reader = _Reader(stage.rows, run.method, encoding)
        splits: list[tuple[Split, str]] = [("train", name) for name in run.data.dataset]
        splits += [("eval", name) for name in run.data.eval_dataset]
        for split, name in splits:
            try:
                spec = catalog.get(name)
                rows = read_rows(spec, seed=run.training["seed"], max_samples=run.data.max_samples, **hub)
                yield from reader.samples(rows, spec, split)
            except DataError as error:
                yield Finding(UNREADABLE, "error", name, split, None, str(error), "mend it: the run stops here")


@dataclass(frozen=True, slots=True)
class _Reader:
    plan: RowPlan
    config: Any
    encoding: Encoding

    def samples(self, rows: "Iterator[Row]", spec: "DatasetSpec", split: Split) -> Iterator[Sample]:
        while batch := list(islice(rows, BATCH_ROWS)):
            drafts = [self._draft(row, spec, split) for row in batch]
            texts = [part for _, written in drafts for row in written for part in row]
            ids = iter(turn_ids(self.encoding.encoder, texts))
            for sample, written in drafts:
                turns = [[next(ids) for _ in row] for row in written]
                sample.rows = self._encoded(sample, written, turns) if written else []
                yield sample

    def _encoded(
        self, sample: Sample, written: "list[tuple[Written, ...]]", turns: list[list[list[TurnIds]]]
    ) -> list[Parts]:
        try:
            return encoded_rows(self.plan, sample.example, written, turns, self.encoding, self.config)
        except RowError as refusal:
            sample.refusal = refusal
            return []

    def _draft(self, row: "Row", spec: "DatasetSpec", split: Split) -> "tuple[Sample, list[tuple[Written, ...]]]":
        sample = Sample(spec.name, split, Place(row.file, row.number, row.place))
        try:
            sample.example = example = FORMATS.get(spec.formatting).read(row.usable(), spec)
            if example.media != Media():
                raise RowError("the row has pictures, films or sounds, and this version reads text only")
            if not isinstance(example, self.plan.examples):
                raise RowError(not_taken(example, self.plan.examples))
            return sample, list(self.plan.write(example, self.encoding, self.config))
        except RowError as refusal:
            sample.refusal = refusal
            return sample, []


def context_of(run: "TrainRun", encoding: Encoding, *, has_targets: bool) -> CheckContext:
    tokenizer, template = encoding.encoder.tokenizer, encoding.template
    special = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    longest_first = sorted(special, key=len, reverse=True)
    return CheckContext(
        on_overlong=run.data.on_overlong,
        cutoff_len=encoding.cutoff_len,
        has_targets=has_targets,
        splits_evaluation_off=run.data.val_size > 0,
        split_special_tokens=encoding.encoder.split_special_tokens,
        special_words=re.compile("|".join(map(re.escape, longest_first)) or r"(?!)"),
        answer_words="".join((*template.thinking_tags, *template.tool_call_words)),
    )
