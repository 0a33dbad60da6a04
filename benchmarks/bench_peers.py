"""The programs llamafactory and trl of PyPI against luthier: sft and dpo with LoRA, step by step in turn.

    make bench-peers

Each program gets a virtual environment of its own, since they pin other versions of transformers. It is made once, in
saves/peers or --folder. All read the same model, rows and learning rate, and their losses must agree. Defaults
are used for everything else; trl is also measured without gradient checkpointing, its fastest setting here.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.goals import inputs
from benchmarks.goals.rows import Row, installed_in, origin, table, worst_difference, write
from benchmarks.goals.training import AGREE, Setting, command, memory_cell, seconds_cell, work_file
from benchmarks.goals.turns import ROOT, Measured, ProgramFailed, Ratio, take_turns

NAME = "bench-peers"
TORCH = "torch==2.13.0"
NUM_LINES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Peer:
    packages: tuple[str, ...]
    versions: tuple[str, ...]
    """The libraries whose versions are reported."""
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    """Name -> arguments of its trainer."""


PEERS = {
    # It imports torchvision and torchaudio, whose releases on PyPI work with their own release of torch alone.
    "llamafactory": Peer(("llamafactory",), ("llamafactory", "transformers", "peft")),
    "trl": Peer(
        (TORCH, "trl", "peft"),
        ("trl", "transformers", "peft"),
        {"": {}, "no checkpointing": {"gradient_checkpointing": False}},
    ),
}
WORKS: dict[str, dict[str, Any]] = {
    "sft": {},
    "sft-bf16": {"bf16": True},
    "dpo": {"stage": "dpo", "dataset": "pairs"},
}
GOALS = {"llamafactory": {"sft": "2.8x", "sft-bf16": "2.8x", "dpo": "4x"}, "trl": dict.fromkeys(WORKS, "2.2x")}


class NotInstalled(Exception):
    """pip could not install a peer; the message is pip's."""


def python_of(name: str, folder: Path) -> str:
    """The interpreter of this peer's environment, made if it is missing. Raises `NotInstalled`."""
    place = folder / name
    python = place / "bin" / "python"
    done_mark = place / ".installed"
    if done_mark.exists():
        return str(python)
    print(f"{name}: installing into {place}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    words = [str(python), "-m", "pip", "install", "--quiet", *PEERS[name].packages]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise NotInstalled("\n".join(errors[-NUM_LINES_SHOWN:]))
    done_mark.touch()
    return str(python)


def measure(work: str, pythons: dict[str, str], setting: Setting, batch_size: int) -> list[Row]:
    """One row for each peer, all from the same turns."""
    keys = setting.keys(batch_size, WORKS[work])
    place = setting.folder
    rows = inputs.token_rows(keys, place)
    commands = {"luthier": command("luthier", work_file(place, f"luthier-{work}", keys, None))}
    for name, python in pythons.items():
        for variant, more in PEERS[name].variants.items():
            title = f"{name}, {variant}" if variant else name
            file = work_file(place, f"{title}-{work}".replace(", ", "-").replace(" ", "-"), keys, rows, arguments=more)
            commands[title] = command(name, file, python)
    cache = {"LUTHIER_CACHE": str(place / "cache")}
    found = take_turns(commands, dict.fromkeys(commands, cache))
    ours = found.pop("luthier")
    return [row_of(title, work, measured, ours) for title, measured in found.items()]


def row_of(title: str, work: str, peer: Measured, ours: Measured) -> Row:
    apart = worst_difference(peer.losses, ours.losses)
    remark = f"losses within {apart:.1g}" if apart <= AGREE else f"LOSSES DIFFER by {apart:.2g}"
    goal = GOALS[title.partition(",")[0]][work]
    ratio = str(Ratio.of(peer.seconds, ours.seconds))
    return Row(f"{work} against {title}", goal, ratio, seconds_cell(peer, ours), memory_cell(peer, ours), remark)


def run_all(works: list[str], pythons: dict[str, str], setting: Setting, batch_size: int) -> tuple[list[Row], bool]:
    """The rows, and whether everything could be measured. If one program fails, the others are measured without it."""
    rows, is_whole = [], True
    for work in works:
        left = dict(pythons)
        while left:
            try:
                rows += measure(work, left, setting, batch_size)
                break
            except ProgramFailed as error:
                print(error, file=sys.stderr, flush=True)
                is_whole = False
                name = next((name for name in left if str(error).startswith(name)), None)
                if name is None:
                    rows.append(Row(work, "", "failed", note=str(error).splitlines()[0]))
                    break
                del left[name]
                rows.append(
                    Row(f"{work} against {name}", GOALS[name][work], "failed", note=str(error).splitlines()[-1])
                )
    return rows, is_whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "saves" / "peers", help="where the environments are")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=[*PEERS], help="peers to measure")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=[*WORKS])
    parser.add_argument("--model", type=Path, default=None, help="a folder instead of SmolLM2-135M")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each program; one more warms up")
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args()
    start = time.monotonic()
    pythons, missing = {}, []
    for name in options.only:
        try:
            pythons[name] = python_of(name, options.folder.resolve())
        except NotInstalled as error:
            print(f"{name} cannot be installed here:\n{error}", file=sys.stderr, flush=True)
            missing.append(Row(f"against {name}", "", "not installed", note=str(error)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs.write_data(folder)
        setting = Setting(folder, options.model or inputs.model_folder(), inputs.teacher_folder, options.steps)
        rows, is_whole = run_all(options.works, pythons, setting, options.batch_size)
    versions = "; ".join(installed_in(python, PEERS[name].versions) for name, python in pythons.items())
    text = f"{origin('make bench-peers', (time.monotonic() - start) / 60, options.steps)} Beside it: {versions}."
    text += f"\n\n{table([*rows, *missing])}"
    print(text)
    if options.only == [*PEERS] and options.works == [*WORKS] and options.model is None:
        write(NAME, text)
    return 0 if is_whole and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
