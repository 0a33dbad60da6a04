"""Rows per second from JSON to Arrow against the tokenizer alone, the second start, and peak memory.

    make bench-data

20,000 alpaca-like rows from a fixed seed, SmolLM2's tokenizer, default settings. `encode_batch` gets the same
conversations as whole texts in memory; luthier reads the file, renders the conversations, tokenizes, labels, counts and
stores them. The two alternate, so that other load on the machine affects both; the best of each counts. `--long` also
prepares 1,000,000 short rows and reports the memory this takes.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.gguf"
NUM_ROWS, NUM_LONG_ROWS = 20_000, 1_000_000


def write_rows(folder: Path, num_rows: int, longest: int) -> list[dict[str, str]]:
    """Random words from the example data, with their frequencies; answers of up to `longest` words."""
    rng = random.Random(0)
    text = " ".join(path.read_text() for path in sorted((ROOT / "examples" / "data").glob("*.json*")))
    words = sorted({word.strip('\\",[]{}:') for word in text.split()} - {""})
    rng.shuffle(words)
    weights = list(accumulate(1 / (rank + 10) for rank in range(len(words))))

    def say(least: int, most: int) -> str:
        return " ".join(rng.choices(words, cum_weights=weights, k=rng.randint(least, most)))

    rows = []
    for _ in range(num_rows):
        more = say(3, longest // 4) if rng.random() < 0.4 else ""
        rows.append({"instruction": say(3, longest // 5), "input": more, "output": say(longest // 10, longest)})
    with (folder / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl"}}))
    return rows


def text_side(folder: Path) -> tuple[Any, Any]:
    from luthier.config.load import load_train
    from luthier.workflow.text import load_text_side

    run = load_train(
        {
            "model_name_or_path": str(MODEL),
            "stage": "sft",
            "do_train": True,
            "dataset_dir": str(folder),
            "dataset": "rows",
            "template": "smollm2",
            "output_dir": str(folder / "out"),
        }
    )
    return run, load_text_side(run)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, CPU seconds of all threads)."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def compare(repeats: int) -> None:
    from luthier.core.kinds import STAGES
    from luthier.data.prepare import prepare
    from luthier.data.rows.arrow import row_lengths

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_rows(folder, NUM_ROWS, 160)
        run, side = text_side(folder)
        backend = side.tokenizer.backend_tokenizer
        system = f"<|im_start|>system\n{side.template.default_system}<|im_end|>\n"
        texts = []
        for row in rows:
            question = "\n".join(filter(None, (row["instruction"], row["input"])))
            head = f"{system}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            texts.append(f"{head}{row['output']}<|im_end|>\n")
        alone: list[tuple[float, float]] = []
        ours: list[tuple[float, float]] = []
        for number in range(repeats):
            os.environ["LUTHIER_CACHE"] = str(folder / f"cache {number}")
            alone.append(timed(lambda: backend.encode_batch(texts, add_special_tokens=False)))
            ours.append(timed(lambda: prepare(run, STAGES.get("sft").rows, side.encoding)))
        again = min(timed(lambda: prepare(run, STAGES.get("sft").rows, side.encoding)) for _ in range(3))
        table = prepare(run, STAGES.get("sft").rows, side.encoding).table
        assert table is not None
        tokens = int(row_lengths(table).sum())
    print(f"{NUM_ROWS} rows, {tokens / NUM_ROWS:.0f} tokens each")
    for label, times in (("encode_batch alone", alone), ("luthier, JSON to Arrow", ours)):
        seconds = min(times)[0]
        print(f"{label:24} {NUM_ROWS / seconds:8.0f} rows/s   {seconds:6.2f} s   {min(c for _, c in times):6.2f} CPU s")
    print(f"ratio                    {min(alone)[0] / min(ours)[0]:8.2f}   (target 0.85)")
    print(f"second start             {again[0]:8.3f} s (target 1)")


def prepare_long(folder: str) -> None:
    from luthier.core.kinds import STAGES
    from luthier.data.prepare import prepare

    run, side = text_side(Path(folder))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, _ = timed(lambda: prepare(run, STAGES.get("sft").rows, side.encoding))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{NUM_LONG_ROWS} short rows: {seconds:.1f} s, peak memory {peak / 2**20:.2f} GiB, {before / 2**20:.2f} before"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long", action="store_true", help="prepare a million short rows, too")
    parser.add_argument("--prepare-long", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare_long:
        prepare_long(options.prepare_long)
        return
    compare(options.repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory              {peak / 2**20:8.2f} GiB (with all texts and the tokenizer's encodings of them)")
    if options.long:
        with tempfile.TemporaryDirectory() as name:
            write_rows(Path(name), NUM_LONG_ROWS, 20)
            environment = {**os.environ, "LUTHIER_CACHE": f"{name}/cache"}
            subprocess.run([sys.executable, __file__, "--prepare-long", name], check=True, env=environment)


if __name__ == "__main__":
    main()
