"""Show the tokenized rows as training will see them, then the row counts on stderr.

`--html FILE` writes the rows as a page to share. `--doctor` looks for faults in the datasets instead of showing rows.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from luthier.core.errors import DataError, InvalidInput
from luthier.core.kinds import STAGES

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.data.prepare import PreparedData
    from luthier.data.stream import StreamedRows
    from luthier.workflow.text import TextSide

DEFAULT_LIMIT = 5


def main(argv: list[str]) -> int:
    options, rest = _parser().parse_known_args(argv)

    from luthier.config.load import load_train, read_source
    from luthier.config.runs import TrainRun
    from luthier.core.importing import import_when_used, without_collection
    from luthier.workflow.preflight import load_checked, tell_warnings
    from luthier.workflow.text import load_text_side

    if options.doctor:
        from luthier.workflow.doctor import examine

        import_when_used("torch")
        # Not `load_checked`: that stops at problems in datasets, which the doctor is meant to find.
        return examine(load_train(rest, writes=False), as_json=options.json, limit=options.limit, strict=options.strict)
    run = load_checked("train", read_source(rest), begins=False, writes=False)
    assert isinstance(run, TrainRun)
    tell_warnings(run)
    import_when_used("torch")  # for tokenizers that come as Python code, media and streams
    with without_collection():
        text = load_text_side(run, reads_chat=STAGES.get(run.stage).rows.reads_chat, for_model=False)
    stops: DataError | None = None
    try:
        data = _prepared(run, text, options)
    except DataError as error:
        if run.data.on_overlong != "error":
            raise
        # The other rows are shown, but not saved as those of this run.
        stops = error
        data = _prepared(replace(run, data=replace(run.data, on_overlong="drop", tokenized_path=None)), text, options)
    if options.html is not None:
        _write_page(options, run, data, text)
    elif options.json:
        for _, _, row in _chosen(options, data):
            print(json.dumps(_as_json(row)))
    else:
        _print_rows(options, data, text)
    for line in data.ledger.summary():
        print(line, file=sys.stderr)
    if stops is not None:
        print(f"luthier: training stops here: {stops}", file=sys.stderr)
    return 0 if stops is None else stops.exit_status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="luthier data", usage="luthier data RUN [key=value ...] [options]", description=__doc__
    )
    parser.add_argument(
        "--limit", type=_count, help=f"rows to show, 0 for all (default {DEFAULT_LIMIT}, with --json all)"
    )
    parser.add_argument("--split", choices=["train", "eval"], default="train", help="which rows (default train)")
    parser.add_argument("--row", type=int, help="show only the row with this number, counted from 0")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per line with the columns of the stage"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the rows as an HTML page instead")
    parser.add_argument(
        "--doctor", action="store_true", help="look for duplicates, leakage, lost labels and other faults"
    )
    parser.add_argument(
        "--strict", action="store_true", help="with --doctor: exit status 1 if there are errors or warnings"
    )
    return parser


def _count(text: str) -> int:
    number = int(text)
    if not 0 <= number <= sys.maxsize:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0, and no number beyond all rows")
    return number


def _prepared(run: "TrainRun", text: "TextSide", options: argparse.Namespace) -> "PreparedData":
    from luthier.data.prepare import prepare

    data = prepare(run, STAGES.get(run.stage).rows, text.encoding)
    if data.streamed is not None and options.split == "train":
        return _first_rows(data, data.streamed, options)
    return data


def _first_rows(data: "PreparedData", stream: "StreamedRows", options: argparse.Namespace) -> "PreparedData":
    """The rows of the stream to show; all are those of one pass."""
    wanted = _limit(options) if options.row is None else min(max(options.row, 0), sys.maxsize - 1) + 1
    rows, ledger = stream.first(wanted)
    data.ledger.add(ledger)
    return replace(data, train=cast("Any", rows))


def _limit(options: argparse.Namespace) -> int | None:
    """How many rows of each dataset to show; None for all."""
    if options.limit is None:
        return None if options.json and options.html is None else DEFAULT_LIMIT
    return options.limit or None


def _sets(split: str, data: "PreparedData") -> Mapping[str, Any]:
    train_sets = {"": data.train} if data.train is not None else {}
    sets = train_sets if split == "train" else data.prompts or data.eval
    if not sets:
        raise InvalidInput(f"this run has no {split} rows -> name a dataset{', or set val_size' * (split == 'eval')}")
    return sets


def _chosen(options: argparse.Namespace, data: "PreparedData") -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(name of its dataset or split, number, row) for every requested row."""
    for name, rows in _sets(options.split, data).items():
        if options.row is not None and not 0 <= options.row < len(rows):
            raise InvalidInput(f"--row {options.row}: there are rows 0 to {len(rows) - 1}")
        chosen = range(len(rows)) if options.row is None else [options.row]
        for index in islice(chosen, _limit(options)):
            yield name or options.split, index, rows[index]


def _holds_prompts(options: argparse.Namespace, data: "PreparedData") -> bool:
    """Whether the rows are prompts for generation; their labels are then the answer that follows."""
    return options.split == "eval" and bool(data.prompts)


def _as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    from luthier.inspection.terminal import as_json

    return as_json(row)


def _print_rows(options: argparse.Namespace, data: "PreparedData", text: "TextSide") -> None:
    from luthier.data.rows.columns import numbers_of
    from luthier.inspection.segments import RoleMarks
    from luthier.inspection.terminal import LEGEND, PLAIN_LEGEND, colored, sequences_of, shows_colors, without_colors

    colors, is_prompt = shows_colors(sys.stdout), _holds_prompts(options, data)
    marks = RoleMarks(text.template, text.tokenizer)
    for order, (name, index, row) in enumerate(_chosen(options, data)):
        if not order:
            print(LEGEND if colors else PLAIN_LEGEND, file=sys.stdout if colors else sys.stderr)
        sequences = sequences_of(row)
        num_tokens = sum(len(sequence["input_ids"]) for _, sequence in sequences)
        learned = sum(label >= 0 for _, sequence in sequences for label in sequence["labels"])
        tags = "".join(f", {column}: {row[column][0]}" for column in numbers_of(row))
        print(f"--- {name} row {index}: {num_tokens} tokens, {learned} learned{tags}")
        for title, sequence in sequences:
            if title:
                print(f"-- {title}: {len(sequence['input_ids'])} tokens")
            if colors:
                print(colored(sequence, text.tokenizer, marks, is_prompt=is_prompt))
            else:
                print(without_colors(sequence, text.tokenizer, is_prompt=is_prompt))


def _write_page(options: argparse.Namespace, run: "TrainRun", data: "PreparedData", text: "TextSide") -> None:
    from luthier.core.files import write_atomically
    from luthier.data.rows.columns import WEIGHTS
    from luthier.inspection.images import shown_images
    from luthier.inspection.page import PageRow, page
    from luthier.inspection.segments import RoleMarks, prompt_and_answer
    from luthier.inspection.terminal import sequences_of

    def ids_and_labels(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        return prompt_and_answer(row) if _holds_prompts(options, data) else (row["input_ids"], row["labels"])

    chosen = list(_chosen(options, data))
    rows = [
        PageRow(
            f"{name} ({title})" if title else name,
            index,
            *ids_and_labels(sequence),
            sequence.get(WEIGHTS.name) or (),
            shown_images(sequence),
        )
        for name, index, row in chosen
        for title, sequence in sequences_of(row)
    ]
    total = sum(len(rows) for rows in _sets(options.split, data).values())
    facts = {
        "stage": run.stage,
        "model": Path(run.model.model_name_or_path).name,
        "template": text.template.name,
        "cutoff_len": str(run.data.cutoff_len),
        "shown": f"{len(chosen)} of {total} {options.split} rows",
    }
    title = f"Data of {Path(run.source).name}"
    marks = RoleMarks(text.template, text.tokenizer)
    write_atomically(options.html, page(title, facts, rows, data.ledger, text.tokenizer, marks))
    print(f"written: {options.html}")
