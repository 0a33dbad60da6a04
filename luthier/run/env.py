"""`luthier env`: the versions to name in a bug report."""

import os
import platform
import sys

from luthier import __version__
from luthier.core.versions import is_installed, library_version

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "gguf")
OPTIONAL = ("trl", "deepspeed", "bitsandbytes", "vllm", "matplotlib", "nltk", "tensorboard", "wandb")


def main(argv: list[str]) -> int:
    lines = [
        ("luthier", __version__),
        ("platform", platform.platform()),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("CPU cores", str(os.cpu_count())),
        *((name, library_version(name) or "not installed") for name in LIBRARIES),
        ("accelerators", _accelerators()),
        *((name, version) for name in OPTIONAL if (version := library_version(name))),
        ("./data", "exists" if os.path.isdir("data") else "does not exist"),
    ]
    for name, text in lines:
        print(f"- {name}: {text}")
    return 0


def _accelerators() -> str:
    if not is_installed("torch"):
        return "unknown without torch"
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names) if names else "Apple MPS" if torch.backends.mps.is_available() else "none"
