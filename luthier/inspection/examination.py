"""Runs the checks of the doctor on every row of a run's datasets. Rows that would stop training do not stop it."""

import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.config.keys.hubs import HubTokens
from luthier.core.errors import DataError, MissingExtra
from luthier.core.kinds import CHECKS
from luthier.data.rows.account import DatasetAccount
from luthier.data.rows.encoding import Encoding
from luthier.data.rows.maker import Drawn, Labeled, RowMaker
from luthier.data.sources.catalog import load_catalog
from luthier.data.sources.read import read_rows
from luthier.inspection.doctor import Check, CheckContext, Finding, Place, Sample, Split
from luthier.inspection.duplicates import ExactDuplicates, NearDuplicates

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.data.sources.readers import Row
    from luthier.stages import Stage

BATCH_ROWS = 500
UNREADABLE = "unreadable_data"
"""The check name of findings about a whole dataset: it cannot be read, or not to its end."""

ONE_SIDED = "one_sided_tags"
"""The check name of a finding about all training rows together."""


@dataclass(slots=True)
class Examination:
    """The statistics; complete after the last finding."""

    num_rows: dict[Split, dict[str, int]] = field(default_factory=lambda: {"train": {}, "eval": {}})
    lengths: "dict[Split, array[int]]" = field(default_factory=lambda: {"train": array("L"), "eval": array("L")})
    """Tokens of every row before truncation."""
    not_checked: dict[str, str] = field(default_factory=dict)
    """Check -> why it was skipped."""

    def findings(self, run: "TrainRun", stage: "Stage", encoding: Encoding) -> Iterator[Finding]:
        """Every finding, row by row: first the training datasets, then the evaluation datasets."""
        packer = stage.rows.packer(run, encoding)
        if packer is not None and packer.cuts_rows:
            encoding = encoding.unlimited()
        context = context_of(run, encoding, has_targets=stage.rows.has_targets)
        checks: list[Check] = [CHECKS.get(name) for name in CHECKS.names]
        exact, near = ExactDuplicates(), self._near_duplicates()
        tags = {name: Counter[int]() for name in stage.rows.tags}
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
            if sample.split == "train" and sample.rows:
                for name, tag in stage.rows.tags.items():
                    tags[name][tag(sample.example)] += 1
            for check in checks:
                yield from check.find(sample, context)
        one_sided = stage.rows.one_sided and stage.rows.one_sided(tags)
        if one_sided:
            yield Finding(ONE_SIDED, "warning", ", ".join(run.data.dataset), "train", None, *one_sided)

    def _near_duplicates(self) -> NearDuplicates | None:
        try:
            return NearDuplicates()
        except MissingExtra as missing:
            self.not_checked["near_duplicates"] = str(missing)
            return None

    def _samples(self, run: "TrainRun", stage: "Stage", encoding: Encoding) -> Iterator[Sample | Finding]:
        catalog = load_catalog(
            run.data.dataset_dir, run.data.media_dir, hf_hub_token=run.model.hf_hub_token, cache_dir=run.model.cache_dir
        )
        hub: dict[str, Any] = {"cache_dir": run.model.cache_dir, "tokens": HubTokens.of(run.model)}
        plan = stage.rows
        maker = RowMaker(plan, plan.settings(run.method), encoding, run.data.on_overlong, BATCH_ROWS)
        splits: list[tuple[Split, str]] = [("train", name) for name in run.data.dataset]
        splits += [("eval", name) for name in run.data.eval_dataset]
        for split, name in splits:
            faults: list[DataError] = []
            try:
                spec = catalog.get(name)
                rows = read_rows(spec, seed=run.training["seed"], max_samples=run.data.max_samples, **hub)
            except DataError as error:
                faults.append(error)
            else:
                drawn = (Drawn(row, spec, DatasetAccount()) for row in _up_to_fault(rows, faults))
                yield from (_sample(item, split) for item in maker.labeled(drawn))
            for fault in faults:
                yield Finding(UNREADABLE, "error", name, split, None, str(fault), "fix it: the run stops here")


def _up_to_fault(rows: "Iterator[Row]", faults: list[DataError]) -> "Iterator[Row]":
    """The rows before the first position that cannot be read. The error goes into `faults`."""
    try:
        yield from rows
    except DataError as error:
        faults.append(error)


def _sample(item: Labeled, split: Split) -> Sample:
    row = item.drawn.row
    place = Place(row.file, row.number, row.place)
    return Sample(item.drawn.spec.name, split, place, item.example, item.refusal, item.rows)


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
