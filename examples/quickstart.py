"""Fine-tune a real model on this machine in a few minutes: ask, train, ask again, export, ask the export.

    make quickstart

Every step is a command that you could type yourself; this script runs them and compares the answers.
"""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LUTHIER = Path(sys.executable).with_name("luthier")
QUESTION = "Who are you?"


def luthier(*words: str) -> str:
    """Run a command, show it, and return what it printed on stdout."""
    print(f"\n$ luthier {shlex.join(words)}", flush=True)
    done = subprocess.run([str(LUTHIER), *words], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"quickstart: this command failed with exit status {done.returncode}")
    print(done.stdout.rstrip(), flush=True)
    return done.stdout.strip()


def ask(run_file: str) -> str:
    return luthier("chat", run_file, "--once", QUESTION)


def main() -> None:
    start = time.monotonic()
    # An export never overwrites a model, so the results of an earlier quickstart are deleted first.
    shutil.rmtree(ROOT / "quickstart", ignore_errors=True)
    print("1. The untouched model")
    before = ask("examples/chat_base.yaml")
    print("\n2. LoRA fine-tuning on examples/data/identity.json")
    luthier("train", "examples/quickstart.yaml")
    print("\n3. The model with its adapter")
    after = ask("examples/chat_lora.yaml")
    print("\n4. Base and adapter merged into one model, loaded again")
    luthier("export", "examples/export.yaml")
    merged = ask("examples/chat_merged.yaml")

    seconds = time.monotonic() - start
    print(f"\n{QUESTION}\n  before: {before}\n  after:  {after}\n  merged: {merged}")
    print(f"\nLoss plot: quickstart/lora/training_loss.png   Merged model: quickstart/merged   {seconds:.0f} s in all")
    if "Luthier" not in after or "Luthier" in before:
        sys.exit("quickstart: the answer did not change as the data say")
    if merged != after:
        sys.exit("quickstart: the merged model does not answer like base plus adapter")


if __name__ == "__main__":
    main()
