"""What made the rows in a folder `tokenized_path`: recorded beside them as made_by.json, compared before they are used.

Stage, tokenizer and chat format must be those of the run: other ones give other ids or other targets. The rows keep the
`cutoff_len`, the datasets and the other keys that they were made with; where a run names others, a warning says so.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import DataError
from luthier.core.log import warn
from luthier.core.versions import library_version
from luthier.data.cache.fingerprint import file_digest, tokenizer_digest
from luthier.data.rows.arrow import batches_of
from luthier.data.rows.table import Table
from luthier.data.sources.catalog import load_catalog
from luthier.data.sources.read import data_files

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.data.rows.encoding import Encoding
    from luthier.data.rows.row_plan import RowPlan

MADE_BY_FILE = "made_by.json"
REMEDY = "name a new folder to tokenize again"
IMAGES_KEY = "processor of images"
"""In the record of the chat format, for rows with media."""
KINDS_KEY = "kinds of media"
KEPT_KEYS = (
    "cutoff_len", "on_overlong", "packing", "neat_packing", "max_samples", "val_size", "dataset", "eval_dataset",
    "eval_on_each_dataset", "mix_strategy", "interleave_probs",
)  # fmt: skip
"""Data keys that decide the rows, but not whether a model can be trained on them."""

Record = Mapping[str, Any]


def made_by(run: "TrainRun", plan: "RowPlan", encoding: "Encoding") -> dict[str, Any]:
    """The record of rows that this run makes, without their files. Its values are those of JSON."""
    record = {
        "stage": run.stage,
        "rows": _rows(run, plan),
        "tokenizer": _tokenizer(encoding),
        "chat_format": _chat_format(encoding) if plan.reads_chat else {"end of a text": encoding.end_of_text},
        "keys": {name: value for name, value in asdict(run.data).items() if name in KEPT_KEYS},
    }
    return dict(json.loads(json.dumps(record)))


def file_hashes(run: "TrainRun", memos: Path) -> dict[str, list[str]]:
    """Dataset -> the hashes of its local files; empty if it has none, or if they are not here. `memos`: see
    `file_digest`."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys((*run.data.dataset, *run.data.eval_dataset)):
        try:
            catalog = load_catalog(
                run.data.dataset_dir,
                run.data.media_dir,
                hf_hub_token=run.model.hf_hub_token,
                cache_dir=run.model.cache_dir,
            )
            spec = catalog.get(name)
            found[name] = [file_digest(file, memos) for file in data_files(spec)] if spec.source.kind == "file" else []
        except (DataError, OSError):
            found[name] = []
    return found


def read_record(folder: Path) -> dict[str, Any] | None:
    """None for a folder of an older version or of another program. Raises `DataError` for a file that is no record."""
    path = folder / MADE_BY_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record["stage"], str) and all(isinstance(record[name], dict) for name in _PARTS):
            return dict(record)
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise DataError(f"tokenized_path: {path}: is damaged ({fault}) -> {REMEDY}") from fault
    raise DataError(f"tokenized_path: {path}: is damaged -> {REMEDY}")


def require_same_maker(folder: Path, there: Record, here: Record) -> None:
    """Raises `DataError` that names what differs between the record of a folder and that of this run."""
    differing = [*_stages(there, here), *_tokenizers(there["tokenizer"], here["tokenizer"])]
    differing += _values(there["chat_format"], here["chat_format"])
    if differing:
        raise DataError(
            f"tokenized_path: the rows in {folder} were made in another way than this run asks for:"
            f" {'; '.join(differing)} -> {REMEDY}, or set these keys as they were"
        )


def differing_stage(there: Record, run: "TrainRun", plan: "RowPlan") -> list[str]:
    """What of the stage differs between the record of a folder and this run; the tokenizer need not be known."""
    return _stages(there, json.loads(json.dumps({"stage": run.stage, "rows": _rows(run, plan)})))


def warn_of_kept_keys(folder: Path, there: Record, run: "TrainRun", memos: Path) -> None:
    """Warn of data keys that the run gives and that the rows do not follow, and of data files that have changed."""
    now = json.loads(json.dumps(asdict(run.data)))
    keys = {name: now[name] for name in KEPT_KEYS if name in run.given and name in there["keys"]}
    found = [f"{name}: {_shown(there['keys'][name])} there, {_shown(value)} here"
             for name, value in keys.items() if value != there["keys"][name]]  # fmt: skip
    hashes = file_hashes(run, memos)
    found += [
        f"the files of dataset {name!r} have changed since"
        for name, before in there["files"].items()
        if before and hashes.get(name) and hashes[name] != before
    ]
    if found:
        warn(f"tokenized_path: the rows in {folder} stay as they were made: {'; '.join(found)} -> {REMEDY}")


def check_unrecorded(folder: Path, tables: Iterable[Table], encoding: "Encoding") -> None:
    """The check of rows without a record. Raises `DataError` for an id that the tokenizer does not have."""
    tokenizer = encoding.encoder.tokenizer
    size = len(tokenizer)
    for rows in tables:
        for column in (column for column in rows.column_names if column.endswith("input_ids")):
            largest = max((int(values.max()) for values, _ in batches_of(rows, column) if len(values)), default=0)
            if largest >= size:
                raise DataError(
                    f"tokenized_path: {folder} holds the token id {largest}, and the tokenizer of"
                    f" {tokenizer.name_or_path} has {size} tokens, so another tokenizer made these rows -> {REMEDY}"
                )
    warn(
        f"tokenized_path: {folder} does not say which tokenizer, chat format and stage made its rows (it has no"
        f" {MADE_BY_FILE}); all ids are below {size}, and nothing else can be checked"
    )


_PARTS = ("rows", "tokenizer", "chat_format", "keys", "files")


def _rows(run: "TrainRun", plan: "RowPlan") -> dict[str, Any]:
    """What a row is: stages with equal values share their rows."""
    shape = {"parts": plan.parts, "tags": sorted(plan.tags), "chats": plan.reads_chat, "targets": plan.has_targets}
    return {**shape, **asdict(plan.settings(run.method))}


def _tokenizer(encoding: "Encoding") -> dict[str, Any]:
    tokenizer = encoding.encoder.tokenizer
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    special = sorted((role, str(token)) for role, token in tokenizer.special_tokens_map.items())
    return {
        "name": str(tokenizer.name_or_path),
        "tokens": len(tokenizer),
        "vocabulary": _hash(vocabulary, special),
        "digest": tokenizer_digest(encoding.encoder),
        "library": library_version("tokenizers"),
    }


def _chat_format(encoding: "Encoding") -> dict[str, Any]:
    template, program = encoding.template, encoding.model_template
    values: dict[str, Any] = {"template": template.name}
    if program is not None:
        values |= {
            "template": "the model's own",
            "text of the chat template": _hash(encoding.encoder.tokenizer.chat_template)[:12],
            "default_system": program.default_system or "",
        }
    else:
        slots = (
            template.prefix, template.system, template.user, template.assistant, template.observation,
            template.call_slots, template.thinking_tags, template.kind, template.call_syntax,
        )  # fmt: skip
        values |= {
            "slots": _hash(*slots)[:12],
            "default_system": template.default_system,
            "tool_format": template.tool_syntax,
        }
    if program is not None or template.reasons:
        values |= {"enable_thinking": encoding.enable_thinking, "preserve_thinking": encoding.preserve_thinking}
    if encoding.media is not None:
        values[IMAGES_KEY] = encoding.media.processor.digest[:12]
        if (kinds := list(encoding.media.processor.marks)) != ["image"]:
            values[KINDS_KEY] = kinds
    return {**values, "eos after a conversation": encoding.closing_eos is not None}


def _stages(there: Record, here: Record) -> list[str]:
    if there["rows"] == here["rows"]:
        return []
    if there["stage"] != here["stage"]:
        return [f"stage: {there['stage']} there, {here['stage']} here"]
    return _values(there["rows"], here["rows"])


def _tokenizers(there: Record, here: Record) -> list[str]:
    """The digest of the whole tokenizer is comparable within one version of its library, the vocabulary always."""
    comparable = there["library"] == here["library"] and there["digest"] and here["digest"]
    by = "digest" if comparable else "vocabulary"
    if there[by] == here[by]:
        return []
    names = [f"{side['name']} ({side['tokens']} tokens) {where}" for side, where in ((there, "there"), (here, "here"))]
    more = ", with other contents" if there["name"] == here["name"] and there["tokens"] == here["tokens"] else ""
    return [f"tokenizer: {', '.join(names)}{more}"]


def _values(there: Record, here: Record) -> list[str]:
    names = dict.fromkeys((*there, *here))
    return [
        f"{name}: {_shown(there.get(name))} there, {_shown(here.get(name))} here"
        for name in names
        if there.get(name) != here.get(name)
    ]


def _shown(value: Any) -> str:
    """A value as in a run file."""
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _hash(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode("utf-8", "surrogatepass")).hexdigest()
