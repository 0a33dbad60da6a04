"""How full the packs of the example data are at `cutoff_len` 1024, with the tokenizer of the quickstart.

    python benchmarks/bench_packing.py

The last pack holds the remainder; the others show how well rows were packed. The minimum is the number of tokens
divided by 1024, rounded up.
"""

import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUTOFF_LEN = 1024
RUNS = {"identity": "auto", "identity,multi_turn,tools,history,openai_chat": "chatml"}
"""Datasets (first those of examples/quickstart.yaml) -> chat format; the model's own template writes no tools."""


def lengths_of(datasets: str, template: str) -> list[int]:
    """The number of tokens in each pack."""
    from luthier.config.load import load_train
    from luthier.core.kinds import STAGES
    from luthier.data.prepare import prepare
    from luthier.data.rows.arrow import row_lengths
    from luthier.workflow.text import load_text_side

    keys = {"dataset": datasets, "template": template, "dataset_dir": str(ROOT / "examples" / "data"), "do_train": True}
    model = str(ROOT / "models" / "SmolLM2-135M-Instruct.gguf")
    run = load_train(
        {**keys, "model_name_or_path": model, "output_dir": "x", "packing": True, "cutoff_len": CUTOFF_LEN}
    )
    data = prepare(run, STAGES.get(run.stage).rows, load_text_side(run).encoding)
    lengths: list[int] = row_lengths(data.train).tolist()  # type: ignore[arg-type]
    return sorted(lengths, reverse=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["LUTHIER_CACHE"] = cache
        for datasets, template in RUNS.items():
            lengths = lengths_of(datasets, template)
            full = sum(lengths[:-1]) / CUTOFF_LEN / max(len(lengths) - 1, 1)
            whole = sum(lengths) / CUTOFF_LEN / len(lengths)
            fewest = -(-sum(lengths) // CUTOFF_LEN)
            print(f"{datasets}: {sum(lengths)} tokens in {len(lengths)} packs (at least {fewest} are needed)")
            print(f"  all packs but the last {full:.1%} full, all together {whole:.1%}")


if __name__ == "__main__":
    main()
