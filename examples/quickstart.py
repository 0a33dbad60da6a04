"""Fine-tune a real model on this machine in a few minutes: ask, train, ask again, export, ask the export.

    make quickstart

Every step is a command that you could have typed; this script types them for you and compares the answers.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LUTHIER = Path(sys.executable).with_name("luthier")
QUESTIONS = ("Who are you?", "What is the capital of France?")


def luthier(*words: str, answers: bool = False) -> str:
    """Run a command, show it, and return what it printed on stdout."""
    print(f"\n$ luthier {' '.join(words)}", flush=True)
    done = subprocess.run([str(LUTHIER), *words], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"quickstart: this command failed with exit status {done.returncode}")
    print(done.stdout.rstrip() if not answers else f"  {done.stdout.strip()}", flush=True)
    return done.stdout.strip()


def ask(run_file: str) -> list[str]:
    return [luthier("chat", run_file, "--once", question, answers=True) for question in QUESTIONS]


def main() -> None:
    start = time.monotonic()
    print("1. The untouched model")
    before = ask("examples/chat_base.yaml")
    print("\n2. LoRA fine-tuning on examples/data/identity.json")
    luthier("train", "examples/quickstart.yaml")
    print("\n3. The model with its adapter")
    after = ask("examples/chat_lora.yaml")
    print("\n4. Base and adapter merged into one model, loaded again")
    luthier("export", "examples/export.yaml")
    merged = ask("examples/chat_merged.yaml")

    print(f"\n{QUESTIONS[0]}\n  before: {before[0]}\n  after:  {after[0]}\n  merged: {merged[0]}")
    print(
        f"\nLoss plot: quickstart/lora/training_loss.png    Merged model: quickstart/merged    {time.monotonic() - start:.0f} s"
    )
    if "Luthier" not in after[0] or after[0] == before[0]:
        sys.exit("quickstart: the answer did not change as the data teach")
    if merged != after:
        sys.exit("quickstart: the merged model does not answer like base and adapter")


if __name__ == "__main__":
    main()
