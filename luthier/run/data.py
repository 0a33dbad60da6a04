"""`luthier data RUN`: the tokenised rows as training will see them, then the ledger on stderr."""

import argparse
import json
import sys
from itertools import islice

from luthier.core.errors import InvalidInput
from luthier.core.kinds import STAGES


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="luthier data", description=__doc__)
    parser.add_argument("--limit", type=int, default=5, help="rows to show (default 5; 0 for all)")
    parser.add_argument("--split", choices=["train", "eval"], default="train")
    parser.add_argument("--row", type=int, help="only the row with this number, counted from 0")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, the columns of the stage")
    options, rest = parser.parse_known_args(argv)

    from luthier.config.load import read_source
    from luthier.config.runs import TrainRun
    from luthier.data.prepare import prepare
    from luthier.data.show import as_json, coloured
    from luthier.run.check import load_checked
    from luthier.run.encoding import load_text_side

    run = load_checked("train", read_source(rest), begins=False)
    assert isinstance(run, TrainRun)
    stage = STAGES.get(run.stage)
    text = load_text_side(run, reads_chat=stage.reads_chat)
    data = prepare(run, stage, text.encoding)
    train_sets = {"": data.train} if data.train is not None else {}
    sets = train_sets if options.split == "train" else data.prompts or data.eval
    if not sets:
        raise InvalidInput(
            f"this run has no {options.split} rows -> name a dataset{', or set val_size' * (options.split == 'eval')}"
        )
    for name, rows in sets.items():
        if options.row is not None and not 0 <= options.row < len(rows):
            raise InvalidInput(f"--row {options.row}: there are rows 0 to {len(rows) - 1}")
        chosen = range(len(rows)) if options.row is None else [options.row]
        for index in islice(chosen, options.limit or None):
            row = rows[index]
            if options.json:
                print(json.dumps(as_json(row)))
            else:
                learned = sum(label >= 0 for label in row["labels"])
                print(f"--- {name or options.split} row {index}: {len(row['input_ids'])} tokens, {learned} learned")
                is_prompt = sets is data.prompts
                print(coloured(row, text.tokenizer, colours=sys.stdout.isatty(), is_prompt=is_prompt))
    for line in data.ledger.summary():
        print(line, file=sys.stderr)
    return 0
