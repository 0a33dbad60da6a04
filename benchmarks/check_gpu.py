"""What only a GPU can show, in under 8 minutes: `make check-gpu`.

    python -m benchmarks.check_gpu                         # on a machine with a GPU
    python -m benchmarks.check_gpu --device cpu --tiny     # only whether the checks themselves work

Every stage takes one step in bfloat16 on a random Llama of a billion weights. Attention without padding (sdpa, fa2,
flex) is compared with padded rows, 4-bit layers and fused kernels with the plain ones, the peak memory with the plan,
and the speed with transformers.Trainer. The results go to check-gpu.json and check-gpu.md in saves/check-gpu. What a
missing library makes impossible is skipped by name. Exit status: 0 all checks passed, 1 some failed, 2 there is no GPU.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from benchmarks.goals.rows import installed
from benchmarks.gpu import results
from benchmarks.gpu.checks import GROUPS, run_group
from benchmarks.gpu.results import Check
from benchmarks.gpu.world import World

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "hqq", "flash-attn", "liger-kernel")
NO_DEVICE = (
    "check-gpu: torch finds no CUDA device on this machine -> run it where there is one, or add --device cpu --tiny to"
    " try the checks themselves"
)


def device_name(device: str) -> str:
    """Raises `LookupError` if there is no such device."""
    if device == "cpu":
        return f"cpu ({platform.machine()})"
    import torch

    if not torch.cuda.is_available():
        raise LookupError(NO_DEVICE)
    return torch.cuda.get_device_name()


def run_apart(group: str, options: argparse.Namespace, seconds: float) -> list[Check]:
    """The checks of a group in a process of its own."""
    file = options.out / f"{group}.jsonl"
    file.unlink(missing_ok=True)
    words = [sys.executable, "-m", "benchmarks.check_gpu", "--group", group, "--out", str(options.out)]
    words += ["--device", options.device, *(["--tiny"] if options.tiny else [])]
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})}
    log = options.out / f"{group}.log"
    reason = ""
    with log.open("w") as output:
        try:
            done = subprocess.run(words, cwd=ROOT, env=environment, stdout=output, stderr=output, timeout=seconds)
        except subprocess.TimeoutExpired:
            reason = f"stopped after {seconds:.0f} s"
        else:
            if done.returncode:
                reason = f"the process ended with status {done.returncode}: see {log}"
    found = results.read(file)
    return [*found, Check(group, "all", "failed", remark=reason)] if reason else found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers; what --device cpu needs")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=[*GROUPS])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "saves" / "check-gpu")
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    if options.device == "cpu" and not options.tiny:
        parser.error("a billion weights take hours on a CPU -> add --tiny")
    world = World(options.out / ("tiny" if options.tiny else "world"), options.device, options.tiny)
    if options.group:
        run_group(options.group, world, options.out / f"{options.group}.jsonl")
        return 0
    try:
        device = device_name(options.device)
    except LookupError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    checks: list[Check] = []
    for group in options.only:
        left = end - time.monotonic()
        if left > 0:
            checks += run_apart(group, options, left)
        else:
            checks.append(Check(group, "all", "skipped", remark=f"{options.minutes:g} minutes were over"))
        print(f"{group}: {sum(check.group == group for check in checks)} checks", file=sys.stderr, flush=True)
    facts = {"date": date.today().isoformat(), "device": device, "versions": installed(LIBRARIES)}
    as_json, page = results.write(options.out, checks, facts)
    print(page.read_text(encoding="utf-8"))
    print(f"saved: {as_json} and {page}")
    return 1 if any(check.status == "failed" for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
