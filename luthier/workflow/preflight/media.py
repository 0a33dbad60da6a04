"""What the media in the data rule out, and what a folder of tokenized rows says of itself: known without the model."""

from collections.abc import Iterator
from pathlib import Path

from luthier.config.keys.data import holds_tokenized_rows
from luthier.config.rules.bridge import under_bridge, under_megatron
from luthier.config.runs import TrainRun
from luthier.core.errors import DataError, ModelError, Problem
from luthier.core.kinds import STAGES
from luthier.core.versions import is_installed
from luthier.data.cache.provenance import REMEDY, differing_stage, read_record
from luthier.data.media.blocks import require_supported
from luthier.data.media.kinds import media_kind
from luthier.model.files.sources import is_hub_id, model_source
from luthier.model.media.processor import processor_class, reads_text_only
from luthier.stages._reward import RewardConfig
from luthier.workflow.text import kinds_of_media


def media_problems(run: TrainRun) -> tuple[list[Problem], list[Problem]]:
    """(errors, what this machine misses). Datasets that are described on a hub are not fetched for this."""
    if isinstance(run.data.dataset_dir, str) and run.data.dataset_dir.startswith("REMOTE:"):
        return [], []
    try:
        kinds = kinds_of_media(run)
    except DataError as error:  # tokenized rows
        reason, _, remedy = str(error).removeprefix("tokenized_path: ").partition(" -> ")
        return [Problem("tokenized_path", reason, remedy)], []
    errors = [*_rows_of_another_stage(run)]
    if kinds:
        words = " and ".join(media_kind(name).plural for name in kinds)
        errors += [*_refusals(run, f"and the data declare {words}"), *_model_problems(run, kinds, words)]
    return errors, [*_missing_libraries(kinds)]


def _refusals(run: TrainRun, declared: str) -> Iterator[Problem]:
    if run.parallel.sp_size > 1:
        reason = f"rows of text alone can be spread over processes, {declared}"
        yield Problem("sp_size", reason, "leave sp_size out")
    if under_megatron(run):
        variable = "USE_MEGATRON_BRIDGE" if under_bridge(run) else "USE_MCA"
        reason = f"rows of text alone can be trained on, {declared}"
        yield Problem(variable, reason, f"unset {variable}", file="environment")
    if run.model.split_special_tokens:
        reason = f"would write the tokens of media as text, {declared}"
        yield Problem("split_special_tokens", reason, "leave it out")
    if isinstance(run.method, RewardConfig) and run.method.rollout_backend == "vllm":
        reason = f"prompts go to the server as token ids, {declared}"
        yield Problem("rollout_backend", reason, "leave it out")


def _model_problems(run: TrainRun, kinds: tuple[str, ...], words: str) -> Iterator[Problem]:
    """A local model that takes no media, or not these."""
    key, name = "model_name_or_path", run.model.model_name_or_path
    if not name or is_hub_id(name):
        return
    source = model_source(run.model)
    if reads_text_only(source):
        columns = ", ".join(f"{media_kind(kind).column!r}" for kind in kinds)
        reason = f"the model reads text only, and the data declare {words}"
        yield Problem(key, reason, f"take another model, or remove {columns} from the columns of the data")
        return
    try:
        require_supported(processor_class(source), kinds)
    except ModelError as error:
        reason, _, remedy = str(error).partition(" -> ")
        yield Problem(key, reason, remedy)


def _missing_libraries(kinds: tuple[str, ...]) -> Iterator[Problem]:
    for kind in map(media_kind, kinds):
        if kind.library and not is_installed(kind.library):
            reason = f"reading {kind.plural} needs the library {kind.library}, which is not installed"
            yield Problem("dataset", reason, f"pip install 'luthier[{kind.extra}]'")


def _rows_of_another_stage(run: TrainRun) -> Iterator[Problem]:
    """Tokenized rows that another kind of stage made. What else made them is compared with the tokenizer."""
    path = run.data.tokenized_path
    if path is None or not holds_tokenized_rows(run.data) or run.stage not in STAGES.names:
        return
    record = read_record(Path(path))
    differing = [] if record is None else differing_stage(record, run, STAGES.get(run.stage).rows)
    if differing:
        reason = f"its rows were made in another way than this run asks for: {'; '.join(differing)}"
        yield Problem("tokenized_path", reason, f"{REMEDY}, or set these keys as they were")
