"""Seconds and peak memory of loading a model through luthier, against `from_pretrained` of transformers alone.

The model is the quickstart's 135M one, as a GGUF file and as a safetensors folder made from it, in float32. Every
measurement runs in its own process, the two ways alternate, and the fastest of several counts. Peak memory is that of
the process minus its imports, beside the bytes of the weights: twice as much would be a second copy.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.model.files.sources import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GGUF = Path("models/SmolLM2-135M-Instruct.gguf")
MOST_LONGER = 0.15


def load_plain(source: Path) -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    if source.suffix != ".gguf":
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    dequantized = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, quantization_config=dequantized
    )


def load_luthier(source: Path) -> "PreTrainedModel":
    import torch

    from luthier.model.loading.load import load_model

    return load_model(ModelSource(str(source)), dtype=torch.float32)


def memory_bytes(key: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak). Unlike getrusage, these do not include the parent process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(way: str, source: Path) -> None:
    import torch  # noqa: F401
    from transformers import GgufConfig, LlamaForCausalLM  # noqa: F401

    import luthier.model.loading.load  # noqa: F401

    if source.suffix == ".gguf":
        import gguf  # noqa: F401
    before_bytes = memory_bytes("VmRSS")
    start = time.perf_counter()
    model = {"plain": load_plain, "luthier": load_luthier}[way](source)
    seconds = time.perf_counter() - start
    peak_bytes = memory_bytes("VmHWM") - before_bytes
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes, "weight_bytes": weight_bytes}))


def child(way: str, source: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--way", way, "--source", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=["plain", "luthier"])
    parser.add_argument("--source", type=Path)
    args = parser.parse_args()
    if args.way:
        measure(args.way, args.source)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "safetensors")
        load_luthier(GGUF).save_pretrained(folder)
        longer: list[float] = []
        print(f"{'':24}{'seconds':>10}{'peak GB':>10}{'weights GB':>12}")
        for source in (folder, GGUF):
            runs: dict[str, list[dict[str, float]]] = {"plain": [], "luthier": []}
            for _ in range(args.repeats):
                for way, found in runs.items():
                    found.append(child(way, source))
            best = {way: min(run["seconds"] for run in found) for way, found in runs.items()}
            for way, found in runs.items():
                peak, weights = (min(run[key] for run in found) / 1e9 for key in ("peak_bytes", "weight_bytes"))
                title = f"{source.suffix.lstrip('.') or source.name}, {way}"
                print(f"{title:24}{best[way]:>10.2f}{peak:>10.2f}{weights:>12.2f}")
            longer.append(best["luthier"] / best["plain"] - 1)
            print(f"{'':24}{longer[-1]:>+10.1%}")
    if max(longer) > MOST_LONGER:
        raise SystemExit(f"bench-load: loading takes {max(longer):.0%} longer; the limit is {MOST_LONGER:.0%}")


if __name__ == "__main__":
    main()
