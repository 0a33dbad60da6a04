"""What each training method does to SmolLM2-135M: one run per example, its curve, and its figures before and after.

    make methods                 # all of them; some minutes each on two cores
    make methods METHODS="dpo gkd"

The run files in examples/ are used as they are. The curves go to docs/curves/ and the table to stdout. The command
fails if a method does not reach its goal. The reward of one step is the mean over a few answers, so it is noisy: for
ppo and grpo the last figure is the mean of the last five steps.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from textwrap import fill

ROOT = Path(__file__).resolve().parent.parent
CURVES = ROOT / "docs" / "curves"


@dataclass(frozen=True)
class Method:
    metric: str
    """The key of trainer_log.jsonl that shows whether the method works."""
    label: str
    """What the metric is; the label of the y axis."""
    reaches: Callable[[float, float], bool]
    """(first value, last value) -> whether training worked."""
    num_last: int = 1
    """The last figure is the mean of this many values."""
    needs: tuple[str, ...] = ()
    """Examples that must run before this one."""


def rises(first: float, last: float) -> bool:
    return last > first


def falls(first: float, last: float) -> bool:
    return last < first


METHODS = {
    "quickstart": Method("loss", "loss, nats per token", falls),
    "rm": Method("eval_accuracy", "share of held-out pairs ranked right", lambda first, last: last > 0.9),
    "dpo": Method("eval_rewards/margins", "margin on held-out pairs", rises),
    "kto": Method("eval_rewards/margins", "margin on held-out answers", rises),
    "orpo": Method("eval_rewards/margins", "margin on held-out pairs", rises),
    "simpo": Method("eval_rewards/margins", "margin on held-out pairs", rises),
    "ppo": Method("reward", "mean reward, from 0 to 1", lambda first, last: last - first >= 0.4, num_last=5),
    "grpo": Method("reward", "mean reward, from 0 to 1", lambda first, last: last - first >= 0.4, num_last=5),
    "gkd": Method(
        "eval_teacher_kl",
        "KL to the teacher on held-out questions, nats a token",
        falls,
        needs=("quickstart",),
    ),
}


def points(log: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) for each logged value."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [(entry["current_steps"], entry[metric]) for entry in entries if metric in entry]


def draw(name: str, method: Method, curve: list[tuple[int, float]]) -> Path:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.8, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, color="#2a5db0")
    axes.set(xlabel="optimizer step", ylabel=fill(method.label, 30), title=f"examples/{name}.yaml")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    CURVES.mkdir(parents=True, exist_ok=True)
    path = CURVES / f"{name}.png"
    figure.savefig(path, dpi=90)
    return path


def run(name: str, output_dir: Path) -> float:
    """Run one example; return the seconds it took."""
    started = time.monotonic()
    words = [sys.executable, "-m", "luthier", "train", f"examples/{name}.yaml", f"output_dir={output_dir}"]
    subprocess.run([*words, "overwrite_output_dir=true"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"one or more of {', '.join(METHODS)}; all by default")
    names = parser.parse_args().methods or list(METHODS)
    unknown = sorted(set(names) - set(METHODS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)} (choose from {', '.join(METHODS)})")
    for needed in dict.fromkeys(need for name in names for need in METHODS[name].needs):
        if not (ROOT / needed / "lora" / "adapter_model.safetensors").is_file():
            run(needed, ROOT / needed / "lora")
    print("| method | figure | first | last | minutes |\n|---|---|---|---|---|")
    failed = []
    for name in names:
        method = METHODS[name]
        with tempfile.TemporaryDirectory() as folder:
            seconds = run(name, Path(folder))
            curve = points(Path(folder, "trainer_log.jsonl"), method.metric)
        draw(name, method, curve)
        values = [value for _, value in curve]
        first, last = values[0], fmean(values[-method.num_last :])
        print(f"| {name} | {method.label} | {first:.3f} | {last:.3f} | {seconds / 60:.1f} |", flush=True)
        if not method.reaches(first, last):
            failed.append(name)
    if failed:
        raise SystemExit(f"bench_methods: these did not reach their goal: {', '.join(failed)}")


if __name__ == "__main__":
    main()
