"""What does not go together with quantized weights is told before torch is imported, with a remedy."""

import json
import subprocess
import sys

import pytest

from luthier.config.load import load_export, load_infer, load_train
from luthier.core.errors import ConfigError
from luthier.core.kinds import QUANTIZERS

TRAIN = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "do_train": True, "quantization_bit": 4}
INFER = {"model_name_or_path": "m", "quantization_bit": 4}


def the_problem(loader, keys):
    with pytest.raises(ConfigError) as caught:
        loader(keys)
    (problem,) = caught.value.problems
    assert problem.remedy
    return problem


@pytest.mark.parametrize(
    ("keys", "key", "reason"),
    [
        ({"finetuning_type": "full"}, "quantization_bit", "cannot be trained, only an adapter"),
        ({"finetuning_type": "freeze"}, "quantization_bit", "cannot be trained, only an adapter"),
        ({"resize_vocab": True, "additional_target": "lm_head"}, "resize_vocab", "cannot get new rows"),
        ({"add_tokens": "<a>"}, "add_tokens", "cannot get new rows"),
        ({"add_special_tokens": "<a>"}, "add_special_tokens", "cannot get new rows"),
        ({"new_special_tokens_config": "t.yaml"}, "new_special_tokens_config", "cannot get new rows"),
        ({"create_new_adapter": True, "adapter_name_or_path": "a"}, "create_new_adapter", "have to be merged"),
        ({"adapter_name_or_path": "a,b"}, "adapter_name_or_path", "takes one adapter only"),
        ({"quantization_device_map": "auto"}, "quantization_device_map", "for generation, not for training"),
        ({"train_from_scratch": True}, "train_from_scratch", "cannot be trained"),
        ({"quantization_bit": 3}, "quantization_bit", "4 or 8 bits"),
        ({"quantization_bit": 7, "quantization_method": "hqq"}, "quantization_bit", "1, 2, 3, 4, 5, 6 or 8 bits"),
        ({"quantization_method": "eetq"}, "quantization_bit", "EETQ quantizes to 8 bits"),
        ({"quantization_bit": 8, "fsdp": "full_shard"}, "quantization_bit", "4-bit bitsandbytes only"),
        ({"quantization_method": "hqq", "fsdp": "full_shard"}, "quantization_bit", "4-bit bitsandbytes"),
        *(
            ({"quantization_method": name}, "quantization_method", "quantizes nothing while loading")
            for name in ("gptq", "awq", "aqlm", "quanto", "mxfp4", "fp8")
        ),
    ],
)
def test_what_does_not_go_together(keys, key, reason):
    problem = the_problem(load_train, {**TRAIN, **keys})
    assert problem.key == key and reason in problem.reason


def test_pissa_takes_apart_what_must_stay_as_it_is():
    with pytest.raises(ConfigError) as caught:
        load_train({**TRAIN, "pissa_init": True})
    assert "pissa_init" in {problem.key for problem in caught.value.problems}


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_3_shares_out_4_bits_of_bitsandbytes_only(tmp_path, stage):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}), encoding="utf-8")
    load_train({**TRAIN, "deepspeed": str(file)})
    keys = {**TRAIN, "deepspeed": str(file), "quantization_bit": 8}
    if stage == 2:
        load_train(keys)
    else:
        assert the_problem(load_train, keys).key == "quantization_bit"


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"adapter_name_or_path": "a,b"}, "adapter_name_or_path"),
        ({"quantization_method": "hqq", "quantization_device_map": "auto"}, "quantization_device_map"),
        ({"quantization_bit": 8, "quantization_device_map": "auto"}, "quantization_device_map"),
        ({"quantization_bit": 16}, "quantization_bit"),
        ({"quantization_method": "gptq"}, "quantization_method"),
    ],
)
def test_answers_from_a_quantized_model_have_rules_too(keys, key):
    assert the_problem(load_infer, {**INFER, **keys}).key == key


@pytest.mark.parametrize("keys", [{}, {"quantization_device_map": "auto"}, {"finetuning_type": "full"}])
def test_a_quantized_model_may_answer(keys):
    assert load_infer({**INFER, **keys}).warnings == ()


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"bf16": True}, "quantization_bit"),
        ({"quantization_method": "hqq", "quantization_type": "fp4"}, "quantization_type"),
        ({"quantization_bit": 8, "double_quantization": False}, "double_quantization"),
        (
            {"do_train": False, "do_predict": True, "eval_dataset": "d", "predict_with_generate": True},
            "quantization_bit",
        ),
    ],
)
def test_warnings(keys, key):
    assert [warning.key for warning in load_train({**TRAIN, **keys}).warnings] == [key]


def test_the_run_file_of_the_reference_has_no_warning_but_that_it_trains():
    keys = {name: value for name, value in TRAIN.items() if name != "do_train"} | {
        "lora_target": "q_proj,v_proj",
        "flash_attn": "fa2",
        "cutoff_len": 1024,
    }
    assert [warning.key for warning in load_train(keys).warnings] == ["do_train"]
    assert load_train(keys).quantization.quantization_method == "bnb"


def test_an_export_reads_the_original_weights_and_says_so():
    (warning,) = load_export({"model_name_or_path": "m", "export_dir": "e", "quantization_bit": 4}).warnings
    assert warning.key == "quantization_bit" and "original weights in full precision" in warning.reason


def test_every_method_names_its_bits_and_its_extra():
    import tomllib

    from tests.test_architecture import ROOT

    with (ROOT.parent / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for name in QUANTIZERS.names:
        quantizer = QUANTIZERS.get(name)
        assert set(quantizer.bits) <= set(range(1, 9))
        assert set(quantizer.libraries) == {requirement.partition(">")[0] for requirement in extras[quantizer.extra]}


def test_a_wrong_pair_is_told_without_torch():
    code = (
        "import sys; from luthier.config.load import load_train; from luthier.core.errors import ConfigError\n"
        f"keys = { ({**TRAIN, 'finetuning_type': 'full'})!r}\n"
        "try: load_train(keys)\n"
        "except ConfigError as error: print('torch' in sys.modules, 'quantization_bit' in str(error))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "True"]
