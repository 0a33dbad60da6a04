"""What every training method does to SmolLM2-135M: one run of each example, its curve, the figures before and after.

    make methods                 # all of them; some minutes each on two cores
    make methods METHODS="dpo gkd"

Each run file in examples/ is taken as it is. The curves are written to docs/pictures/, the table is printed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"


@dataclass(frozen=True)
class Method:
    metric: str
    """The key of trainer_log.jsonl that tells whether the method works."""
    words: str
    needs: tuple[str, ...] = ()
    """Run files that have to be run before this one."""


METHODS = {
    "rm": Method("eval_accuracy", "share of held-out pairs ranked right"),
    "dpo": Method("eval_rewards/margins", "margin on held-out pairs"),
    "kto": Method("eval_rewards/margins", "margin on held-out answers"),
    "orpo": Method("eval_rewards/margins", "margin on held-out pairs"),
    "simpo": Method("eval_rewards/margins", "margin on held-out pairs"),
    "ppo": Method("reward", "mean reward"),
    "grpo": Method("reward", "mean reward"),
    "gkd": Method("eval_teacher_kl", "KL to the teacher on held-out questions, nats a token", ("quickstart",)),
}


def points(log: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of every logged value."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [(entry["current_steps"], entry[metric]) for entry in entries if metric in entry]


def draw(name: str, method: Method, curve: list[tuple[int, float]]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, color="#2a5db0")
    axes.set(xlabel="optimizer step", ylabel=method.words, title=f"examples/{name}.yaml")
    axes.grid(alpha=0.3)
    PICTURES.mkdir(parents=True, exist_ok=True)
    path = PICTURES / f"{name}.png"
    figure.savefig(path, dpi=90)
    return path


def run(name: str, output_dir: Path) -> float:
    """Seconds that the run took."""
    started = time.monotonic()
    words = [sys.executable, "-m", "luthier", "train", f"examples/{name}.yaml", f"output_dir={output_dir}"]
    subprocess.run([*words, "overwrite_output_dir=true"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)}; all by default")
    names = parser.parse_args().methods or list(METHODS)
    unknown = sorted(set(names) - set(METHODS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)} (choose from {', '.join(METHODS)})")
    for needed in dict.fromkeys(need for name in names for need in METHODS[name].needs):
        if not (ROOT / needed / "lora" / "adapter_model.safetensors").is_file():
            run(needed, ROOT / needed / "lora")
    print("| method | figure | first | last | minutes |\n|---|---|---|---|---|")
    for name in names:
        method = METHODS[name]
        with tempfile.TemporaryDirectory() as folder:
            seconds = run(name, Path(folder))
            curve = points(Path(folder, "trainer_log.jsonl"), method.metric)
        draw(name, method, curve)
        print(f"| {name} | {method.words} | {curve[0][1]:.3f} | {curve[-1][1]:.3f} | {seconds / 60:.1f} |", flush=True)


if __name__ == "__main__":
    main()
