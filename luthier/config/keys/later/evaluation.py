"""Keys of `luthier eval`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    task: str | None = None
    """Benchmark and split, e.g. `mmlu_test`."""
    task_dir: str = "evaluation"
    """Folder with the benchmarks."""
    batch_size: int = 4
    """Questions answered together."""
    seed: int = 42
    """Seed of the random numbers."""
    lang: Literal["en", "zh"] = "en"
    """Language of the prompt."""
    n_shot: int = 5
    """Solved examples put before each question."""
    save_dir: str | None = None
    """Folder for the results."""
    download_mode: str = "reuse_dataset_if_exists"
    """When benchmark files are fetched again."""
