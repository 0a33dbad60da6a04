"""`luthier template check MODEL [NAME]`: do the rows of training match what an inference server sends?

NAME is the chat format of training, by default the model's own chat template (auto). Without --data a built-in set of
conversations is used. Exit status 0: all equal, 1: something differs, 2: bad input.
"""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.keys.hubs import HubTokens
from luthier.config.keys.processor import given_limits
from luthier.core.errors import InvalidInput, MissingExtra, ModelError, RowError
from luthier.core.importing import import_when_used, without_collection
from luthier.core.log import silence_libraries, warn
from luthier.data.chat.encoder import Encoder
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.chat.template_slots import choose_template
from luthier.data.media.blocks import MediaProcessor
from luthier.data.media.items import stored
from luthier.data.rows.encoding import Encoding
from luthier.data.rows.maker import read_example, require_taken
from luthier.data.types import Dialogue
from luthier.inspection.agreement import Finding, compare, default_systems
from luthier.inspection.sample_dialogues import SAMPLES, Sample, with_images
from luthier.inspection.server import Server
from luthier.model.files.sources import ModelSource, model_source
from luthier.workflow.text import media_side

if TYPE_CHECKING:
    from luthier.config.keys.data import DataConfig
    from luthier.config.runs import TrainRun


@dataclass(frozen=True, slots=True)
class Sides:
    """The two sides of the comparison."""

    training: Encoding
    server: Server
    stop_ids: tuple[int, ...]
    """Inference stops at these."""

    def check(self, sample: Sample) -> Finding:
        items = sample.dialogue.media.items
        server = replace(self.server, enable_thinking=sample.enable_thinking, items=items)
        return compare(self.training.with_thinking(sample.enable_thinking), server, sample.dialogue, self.stop_ids)


def check(
    model: str,
    name: str | None,
    *,
    as_json: bool,
    run_file: str | None,
    num_rows: int,
    trust_remote_code: bool = False,
) -> int:
    """Compare, print, and return the exit status. Raises `ModelError` for a model without a chat template.

    The model is fetched as the run file says, if there is one.
    """
    if num_rows < 1:
        raise InvalidInput(f"--rows {num_rows}: must be at least 1")
    run = _run(run_file) if run_file else None
    name = name or (run.data.template if run else None) or "auto"
    source = replace(model_source(run.model), name=model) if run else ModelSource(model)
    source = replace(source, trust_remote_code=source.trust_remote_code or trust_remote_code)
    import_when_used("torch")  # for tokenizers that come as Python code
    with without_collection():
        media = _media(source, run)
        sides = load_sides(source, name, run.data if run else None, media)
    samples = islice(_rows_of(run, tuple(media.marks) if media else ()), num_rows) if run else iter(_samples(media))
    findings = [(sample.name, sides.check(sample)) for sample in samples]
    differing = [finding for _, finding in findings if finding.status == "differs"]
    if as_json:
        print(json.dumps(_as_json(model, name, sides, findings), ensure_ascii=False, indent=2))
    else:
        print("\n".join([*_head(model, name, sides), *_lines(findings), *_foot(findings, len(differing), name)]))
    return 1 if differing else 0


def _media(source: ModelSource, run: "TrainRun | None") -> MediaProcessor | None:
    """The processor of a model that sees; None for one that reads text, or whose processor cannot be loaded here."""
    from luthier.model.media.processor import load_processor, reads_text_only

    if reads_text_only(source):
        return None
    try:
        processor, _ = load_processor(source, given_limits(run) if run else {})
        return MediaProcessor(processor)
    except MissingExtra as fault:
        warn(f"images are not compared: {fault}")
    except ModelError:  # without a processor that reads images, there are none to compare
        pass
    return None


def _samples(media: MediaProcessor | None) -> tuple[Sample, ...]:
    """The built-in conversations; for a model that sees, one with two images too."""
    if media is None or "image" not in media.marks:
        return SAMPLES
    from PIL import Image

    paths = []
    for width, height in ((84, 56), (100, 40)):
        content = io.BytesIO()
        Image.new("RGB", (width, height)).save(content, "PNG")
        paths.append(stored(content.getvalue()))
    return (*SAMPLES, with_images(*paths))


def load_sides(
    source: ModelSource, name: str, data: "DataConfig | None" = None, media: MediaProcessor | None = None
) -> Sides:
    """The tokenizer is loaded once for each side, since a format may change it. `media`: of a model that sees."""
    from luthier.model.tokenizer import fit_tokenizer, load_tokenizer, stop_token_ids

    silence_libraries()
    tokenizer = load_tokenizer(source)
    if not tokenizer.chat_template:
        raise InvalidInput(
            f"{source.name}: the model has no chat template of its own, so there is nothing to compare with"
        )
    thinking, keeps, system = (
        (data.enable_thinking, data.preserve_thinking, data.default_system) if data else (True, False, None)
    )
    server = Server(tokenizer, thinking, keeps, system, media)
    own = choose_template("auto", tokenizer)
    stop_ids = (*stop_token_ids(tokenizer, own.stop_words), *_generation_ends(source.name))
    if name == "auto":
        marks = {} if media is None else media.marks
        program = ModelChatTemplate(Encoder(tokenizer), thinking, keeps, system or "", marks)
        side = None if media is None else media_side(media, own, program.encoder, program)
        return Sides(Encoding(program.encoder, own, None, thinking, keeps, program, side), server, stop_ids)
    template = choose_template(name, tokenizer, data.tool_format if data else None, system)
    fitted = fit_tokenizer(
        load_tokenizer(source),
        stop_words=template.stop_words,
        replace_eos=template.replace_eos,
        vocab_size=len(tokenizer),
    )
    encoder = Encoder(fitted.tokenizer)
    side = None if media is None else media_side(media, template, encoder, None)
    training = Encoding(encoder, template, None, thinking, keeps, media=side)
    return Sides(training, server, tuple(dict.fromkeys((*stop_ids, *fitted.stop_token_ids))))


def _generation_ends(model: str) -> list[int]:
    """The stop tokens in the generation_config.json of the model."""
    file = Path(model).expanduser() / "generation_config.json"
    if not file.is_file():
        return []
    try:
        ends = json.loads(file.read_text("utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as fault:
        raise InvalidInput(f"{file}: not a JSON object ({fault})") from fault
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _run(file: str) -> "TrainRun":
    from luthier.config.load import load_train

    return load_train(Path(file))


def _rows_of(run: "TrainRun", kinds: tuple[str, ...]) -> Iterator[Sample]:
    """The dialogues of a run's datasets, named by their places. Rows that training cannot use are skipped. `kinds`: of
    the media that the model takes."""
    from luthier.data.sources.catalog import load_catalog
    from luthier.data.sources.read import read_rows

    data = run.data
    catalog = load_catalog(
        data.dataset_dir, data.media_dir, hf_hub_token=run.model.hf_hub_token, cache_dir=run.model.cache_dir
    )
    hub: dict[str, Any] = {"cache_dir": run.model.cache_dir, "tokens": HubTokens.of(run.model)}
    thinking = data.enable_thinking
    for spec in map(catalog.get, data.dataset or data.eval_dataset):
        for row in read_rows(spec, seed=run.training["seed"], max_samples=data.max_samples, **hub):
            try:
                example = read_example(row, spec)
                require_taken(example, spec, (Dialogue,), media=kinds)
            except RowError:
                continue
            assert isinstance(example, Dialogue), "no other example is taken"
            yield Sample(row.place, example, thinking)


def _head(model: str, name: str, sides: Sides) -> Iterator[str]:
    tokenizer = sides.server.tokenizer
    stops = ", ".join(repr(word) for word in tokenizer.convert_ids_to_tokens(list(dict.fromkeys(sides.stop_ids))))
    yield f"training with template {name}, serving with the chat template of {model}; inference stops at {stops}"
    ours, theirs = default_systems(sides.training, sides.server)
    if ours != theirs:
        yield f"default system text in training: {ours!r}"
        yield f"default system text at the server: {theirs!r}"


def _lines(findings: Iterable[tuple[str, Finding]]) -> Iterator[str]:
    findings = list(findings)
    width = max((len(name) for name, _ in findings), default=0)
    for name, finding in findings:
        if finding.status == "equal":
            yield f"  {name:{width}}  equal ({finding.num_answers} answer{'s' * (finding.num_answers != 1)})"
        elif finding.status == "refused":
            yield f"  {name:{width}}  cannot be served: {finding.reason}"
        else:
            yield from _differing(f"  {name:{width}}  DIFFERS", " " * (width + 4), finding)


def _differing(head: str, indent: str, finding: Finding) -> Iterator[str]:
    place = finding.difference
    if place is None:
        yield f"{head}: {finding.reason}"
        return
    yield f"{head} at token {place.position} (answer {place.answer}), after {place.before!r}"
    yield f"{indent}training: {place.training!r}"
    yield f"{indent}server:   {place.server!r}"
    if finding.reason:
        yield f"{indent}{finding.reason}"


def _foot(findings: list[tuple[str, Finding]], num_differing: int, name: str) -> Iterator[str]:
    refused = sum(finding.status == "refused" for _, finding in findings)
    if not findings:
        yield "no conversation to compare"
    elif num_differing:
        remedy = "" if name == "auto" else " -> template: auto trains what a server sends"
        yield f"{num_differing} of {len(findings) - refused} conversations differ{remedy}"
    else:
        equal = len(findings) - refused
        yield f"all {equal} conversations are equal, and the end of every answer is learned and stops inference"


def _as_json(model: str, name: str, sides: Sides, findings: list[tuple[str, Finding]]) -> dict[str, Any]:
    ours, theirs = default_systems(sides.training, sides.server)
    return {
        "model": model,
        "template": name,
        "equal": all(finding.status != "differs" for _, finding in findings),
        "stop_token_ids": list(dict.fromkeys(sides.stop_ids)),
        "default_system": {"training": ours, "server": theirs},
        "conversations": [{"name": sample, **finding.to_json()} for sample, finding in findings],
    }
