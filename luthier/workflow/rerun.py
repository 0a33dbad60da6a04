"""Running a run file again: what the first run read and ran on, and what of it differs now.

    luthier train OUT/run.yaml output_dir=NEW

The manifest in OUT says what decides the weights besides the keys: `read` has the hashes of models and data, `ran_on`
the processors, threads and processes, `versions` the libraries. If all of it is the same, so are the weights, to the
bit.
"""

import hashlib
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from luthier.config.encode import escaped, to_yaml
from luthier.core.errors import OutputError
from luthier.core.log import info, warn
from luthier.core.machine import Machine
from luthier.core.manifest import MANIFEST_NAME, read_manifest, versions_here
from luthier.data.cache.provenance import file_hashes
from luthier.data.prepare import cache_of

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun

RUN_FILE = "run.yaml"
NUM_PARTS, PART_BYTES = 64, 1 << 20
"""What is hashed of a large file."""
READ, RAN_ON, RERUN_OF = "read", "ran_on", "rerun_of"
MODEL_KEYS = (
    *("model_name_or_path", "adapter_name_or_path", "ref_model", "ref_model_adapters", "reward_model"),
    *("reward_model_adapters", "teacher_model", "teacher_model_adapters", "new_special_tokens_config"),
)
READ_SUFFIXES = {".safetensors", ".bin", ".pt", ".gguf", ".json", ".model", ".txt", ".jinja", ".tiktoken", ".py"}
"""Of the files in the folder of a model that may decide what is loaded."""
NOT_READ = re.compile(
    r"manifest\.json|trainer_state\.json|training_args\.bin|\w+_results\.json|(eval_)?data_report\.json|optimizer\.pt"
    r"|scheduler\.pt"
)
WITHOUT_EFFECT = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "report_to", "plot_loss", "project"),
    *("push_to_hub", "save_total_limit", "save_only_model", "hub_model_id", "cache_dir", "logging_steps"),
    *("logging_strategy", "logging_first_step", "preprocessing_num_workers", "dataloader_num_workers"),
}
"""Keys that may differ between two runs with the same weights."""
WEIGHTS = re.compile(r"(adapter_model|model|pytorch_model|value_head)[\w-]*\.(safetensors|bin)")


def models_of(run: "TrainRun") -> Iterator[str]:
    """Every model and adapter that the run names, once."""
    names = []
    for key in MODEL_KEYS:
        value = run.given.get(key)
        inner = run.model.adapter_folder if "adapter" in key else None
        for name in value if isinstance(value, tuple) else (value,):
            if isinstance(name, str) and "://" not in name:
                names.append(str(Path(name, inner)) if inner and Path(name).expanduser().is_dir() else name)
    yield from dict.fromkeys(names)


def hashes_of_model(name: str) -> dict[str, str]:
    """File -> `quick_digest` of a file, or of the files in a folder; for a name on a hub, its revision in the cache."""
    path = Path(name).expanduser()
    if not path.exists():
        return _revision(name)
    files = [path] if path.is_file() else sorted(path.iterdir())
    files = [file for file in files if file.is_file() and os.access(file, os.R_OK)]
    read = [file for file in files if file.suffix in READ_SUFFIXES and not NOT_READ.fullmatch(file.name)]
    return {file.name: quick_digest(file) for file in read}


def quick_digest(path: Path) -> str:
    """sha256 of the size and the bytes; of a file above 64 MiB, of 64 parts that are spread evenly over it.

    A run must not read all of a large model before it begins. Training changes weights everywhere, and the names and
    shapes of a safetensors file are in its first part.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size} ".encode())
    with path.open("rb") as stream:
        if size <= NUM_PARTS * PART_BYTES:
            digest.update(stream.read())
        else:
            for number in range(NUM_PARTS):
                stream.seek((size - PART_BYTES) * number // (NUM_PARTS - 1))
                digest.update(stream.read(PART_BYTES))
    return digest.hexdigest()


def _revision(name: str) -> dict[str, str]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return {}
    return {"revision": Path(found).parent.name} if isinstance(found, str) else {}


def ran_on(machine: Machine) -> dict[str, Any]:
    """What the bits of a sum depend on besides its numbers."""
    import torch

    found: dict[str, Any] = {"cpu": _cpu_name(), "device": machine.device}
    if machine.device == "cuda":
        found |= {"accelerator": torch.cuda.get_device_name(0), "cuda": torch.version.cuda}
    return {**found, "threads": torch.get_num_threads(), "processes": machine.world_size}


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


class Rerun:
    """What a run reads and runs on, for its manifest, beside that of the run whose run.yaml it was started with.

    What is read is hashed before the model is loaded, since files may change while a run trains. Nothing is done in a
    run that does not train, and in other processes than the first.
    """

    def __init__(self, run: "TrainRun", machine: Machine) -> None:
        self.run, self.machine = run, machine
        self.is_active = run.trains and machine.rank == 0
        self.original = original_of(run) if self.is_active else None
        """The folder of the finished run that is run again; None for any other run file."""
        self.changes: list[str] = []
        self.rows: str | None = None
        self.models: dict[str, dict[str, str]] = {}
        self.datasets: dict[str, list[str]] = {}

    def compare(self, rows: str | None) -> None:
        """Tell what has changed since the original. `rows`: a hash of the training rows, of all ids and labels."""
        if not self.is_active:
            return
        self.rows = rows
        if not self.run.data.streaming:  # whose files may be larger than what is read of them
            self.datasets = file_hashes(self.run, cache_of(self.run.data).folder)
        self.models = {name: hashes_of_model(name) for name in models_of(self.run)}
        if self.original is None:
            return
        manifest, facts = read_manifest(self.original), self.facts()
        self.changes = [
            *_other_keys(self.original, self.run),
            *_other_inputs(manifest, facts[READ]),
            *_other_machine(manifest, facts[RAN_ON]),
        ]
        if READ not in manifest:
            warn(f"{self.original}: its manifest is of an earlier version and does not say what that run read")
        if self.changes:
            warn(f"rerun of {self.original}: the weights may differ, since this has changed: {'; '.join(self.changes)}")
        elif READ in manifest:
            info(f"rerun of {self.original}: keys, model, data, versions and machine are the same")

    def facts(self) -> dict[str, Any]:
        """For the manifest, after `compare`."""
        if not self.is_active:
            return {}
        read = {"models": self.models, "datasets": self.datasets, "rows": self.rows}
        found: dict[str, Any] = {READ: read, RAN_ON: ran_on(self.machine)}
        if self.original is not None:
            found[RERUN_OF] = {"folder": str(self.original), "changes": self.changes}
        return found

    def compare_weights(self, output_dir: Path) -> None:
        """Tell whether both runs ended with the same weights, from the manifests of both."""
        if self.original is None:
            return
        there, here = (_weights(read_manifest(folder)) for folder in (self.original, output_dir))
        told = f"rerun of {self.original}: the weights"
        if there == here:
            info(f"{told} are the same to the bit")
        elif self.changes:
            warn(f"{told} differ")
        else:
            remedy = "on an accelerator, full_determinism: true in both runs makes sums exact"
            warn(f"{told} differ although nothing that is recorded has changed -> {remedy}")


def original_of(run: "TrainRun") -> Path | None:
    """The folder of the finished run whose run.yaml is run again in another folder."""
    source = Path(run.source)
    folder = source.parent
    if source.name != RUN_FILE or not (folder / MANIFEST_NAME).is_file():
        return None
    if folder.resolve() == Path(run.training["output_dir"]).resolve():
        return None
    try:
        read_manifest(folder)
    except OutputError as fault:
        warn(f"{fault}; it is not compared with this run")
        return None
    return folder


def _weights(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {name: file["sha256"] for name, file in manifest["files"].items() if WEIGHTS.fullmatch(name)}


def _other_keys(folder: Path, run: "TrainRun") -> Iterator[str]:
    from luthier.training.report import resolved_run

    there = yaml.safe_load((folder / RUN_FILE).read_text(encoding="utf-8"))
    here = yaml.safe_load(to_yaml(escaped(resolved_run(run))))
    for name in sorted((there.keys() | here.keys()) - WITHOUT_EFFECT):
        if there.get(name) != here.get(name):
            yield f"{name}: {_shown(there.get(name))} there, {_shown(here.get(name))} here"


def _other_inputs(manifest: Mapping[str, Any], read: Mapping[str, Any]) -> Iterator[str]:
    there = manifest.get(READ, {})
    for name, files in there.get("models", {}).items():
        now = read["models"].get(name, {})
        changed = [file for file in {**files, **now} if files.get(file) != now.get(file)]
        if name in read["models"] and changed:
            yield f"model {name}: {', '.join(changed)}"
    files_changed = False
    for name, hashes in there.get("datasets", {}).items():
        if name in read["datasets"] and hashes != read["datasets"][name]:
            files_changed = True
            yield f"data: the files of {name}"
    if "rows" in there and there["rows"] != read["rows"] and not files_changed:
        yield "data: the rows, from the same files (the tokenizer, the chat format or the code that makes rows)"
    if entries := manifest.get("trained_on", ())[1:]:
        yield f"data: the first run was trained on other rows up to step {entries[-1].get('from_step')}"


def _other_machine(manifest: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    versions, on = versions_here(), manifest.get(RAN_ON, {})
    for kind, there, now in (("version of ", manifest.get("versions", {}), versions), ("", on, here)):
        for name in {**there, **now} if there else ():
            if there.get(name) != now.get(name):
                yield f"{kind}{name}: {_shown(there.get(name))} there, {_shown(now.get(name))} here"


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
