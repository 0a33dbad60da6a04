"""Run files as users of the reference write them: each passes, with the warnings named here and no others."""

from pathlib import Path

import pytest

from luthier.config.load import load, read_source

FOLDER = Path(__file__).parent / "run_files"

WORKERS = "preprocessing_num_workers"
PASS: dict[str, tuple[str, ...]] = {
    "adam_mini": (WORKERS,),
    "apollo": (WORKERS,),
    "badam": (WORKERS,),
    "dft": (WORKERS,),
    "export_gptq": (),
    "export_lora": (),
    "freeze_sft": (WORKERS,),
    "full_predict": (),
    "full_sft": (WORKERS,),
    "full_sft_deepspeed": ("deepspeed", WORKERS),
    "fp8_fsdp": (WORKERS, "fp8_enable_fsdp_float8_all_gather"),
    "galore": (WORKERS,),
    "infer_base": (),
    "infer_lora": (),
    "infer_vllm": (),
    "lora_dpo": (WORKERS,),
    "lora_kto": (WORKERS,),
    "lora_ppo": (WORKERS,),
    "lora_predict": (WORKERS,),
    "lora_pt": (WORKERS,),
    "lora_rm": (WORKERS,),
    "lora_sft": (WORKERS,),
    "lora_sft_fsdp": (WORKERS, "fsdp"),
    "lora_sft_ray": (
        WORKERS,
        "ray_run_name",
        "ray_storage_path",
        "ray_num_workers",
        "placement_strategy",
        "resources_per_worker",
    ),
    "loraplus": (WORKERS,),
    "llama_pro": (WORKERS,),
    "pissa": (WORKERS,),
    "multimodal": (),
    "mod": (WORKERS,),
    "muon": (WORKERS,),
    "oft": (WORKERS,),
    "qlora_awq": (WORKERS,),
    "qlora_bnb": ("quantization_bit", WORKERS),
    "qlora_gptq": (WORKERS,),
    "swanlab": (WORKERS,),
    "tokenize_only": (),
}
"""File -> keys it is warned of, in the order of the lines."""


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No launcher, wherever the tests run."""
    for name in ("USE_RAY", "LOCAL_RANK", "FORCE_TORCHRUN", "ALLOW_EXTRA_ARGS"):
        monkeypatch.delenv(name, raising=False)


def load_file(name: str):
    command = name.partition("_")[0]
    command = command if command in ("infer", "export") else "train"
    return load(command, read_source(FOLDER / f"{name}.yaml"))


def test_every_file_has_an_expectation():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(PASS)


@pytest.mark.parametrize("name", sorted(PASS))
def test_the_file_passes(name):
    run = load_file(name)
    assert tuple(warning.key for warning in run.warnings) == PASS[name]
    assert all(warning.reason for warning in run.warnings)
