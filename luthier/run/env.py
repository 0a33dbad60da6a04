"""`luthier env`: the versions to name in a bug report."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from luthier import __version__
from luthier.core.versions import is_installed, library_version

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "gguf")
OPTIONAL = ("trl", "deepspeed", "bitsandbytes", "vllm", "matplotlib", "nltk", "tensorboard", "wandb")


def main(argv: list[str]) -> int:
    lines = [
        ("luthier", __version__),
        *(("git commit", commit) for commit in [_commit(Path(__file__).parents[1])] if commit),
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


def _commit(package: Path) -> str | None:
    """Of the checkout that the package is a part of, and whether files of it have changed since; None in an installed
    package, which may lie in a checkout of something else, or without git."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(package), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    if shutil.which("git") is None or git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit} with changes" if commit and git("status", "--porcelain", "--untracked-files=no") else commit


def _accelerators() -> str:
    if not is_installed("torch"):
        return "unknown without torch"
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names) if names else "Apple MPS" if torch.backends.mps.is_available() else "none"
