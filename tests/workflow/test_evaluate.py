"""`luthier.evaluate`: results that go on after a kill, the model that a run file means, quantized models, adapters."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import luthier
from luthier.config.load import load_eval
from luthier.core.errors import InvalidInput, OutputError, RunFailed
from luthier.evals.tasks.multiple_choice import MultipleChoice
from luthier.workflow.evaluate import as_trained, load_eval_model
from luthier.workflow.text import load_text_side
from tests.evals.small_benchmark import write_benchmark
from tests.killing import watching
from tests.small_world import small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_benchmark(folder)
    return {**small_world(folder), "folder": folder}


@pytest.fixture
def keys(world):
    names = ("model_name_or_path", "dataset_dir", "template")
    own = {"task": "mmlu_test", "task_dir": str(world["folder"]), "n_shot": 1, "max_samples": 3, "batch_size": 2}
    return {**{name: world[name] for name in names}, **own, "infer_dtype": "float32"}


@pytest.fixture(scope="module")
def adapter(world, tmp_path_factory):
    """The folder of a LoRA run that has learned something."""
    out = tmp_path_factory.mktemp("lora")
    values = {name: value for name, value in world.items() if name != "folder"}
    luthier.train({**values, "finetuning_type": "lora", "learning_rate": 0.1, "output_dir": str(out)})
    return str(out)


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def likelihoods(evaluation):
    return [list(record.values["loglikelihoods"].values()) for record in evaluation.records]


def test_what_is_left_in_save_dir(keys, tmp_path):
    found = luthier.evaluate({**keys, "save_dir": str(tmp_path / "out")})
    files = content(tmp_path / "out")
    lines = [json.loads(line) for line in files["results.jsonl"].splitlines()]
    assert lines == [record.as_json() for record in found.records] and len(lines) == 9
    assert lines[0].keys() >= {"subject", "index", "loglikelihoods", "answer", "predicted"}
    summary = json.loads(files["summary.json"])
    assert summary == found.summary and summary["n"] == 9
    assert summary["versions"].keys() == {"luthier", "torch", "transformers", "peft"}
    assert summary["hashes"].keys() == {"mapping.json", "questions"}
    assert files["results.log"].decode() == found.table + "\n"
    assert json.loads(files["results.json"])["towns"].keys() == {"0", "1", "2"}


def test_killed_at_a_write_the_same_command_ends_with_the_same_files(keys, tmp_path):
    folder = tmp_path / "out"
    luthier.evaluate({**keys, "save_dir": str(tmp_path / "whole")})
    expected = content(tmp_path / "whole")
    with watching(folder, kill_at=7):
        luthier.evaluate({**keys, "save_dir": str(folder)})
    kept = len((folder / "results.jsonl").read_text().splitlines())
    assert 0 < kept < 9 and not (folder / "summary.json").exists()
    luthier.evaluate({**keys, "save_dir": str(folder)})
    assert content(folder) == expected


def test_ctrl_c_keeps_what_is_done(keys, tmp_path, monkeypatch, said):
    score, calls = MultipleChoice.score, []

    def interrupted(self, model, questions):
        calls.append(len(questions))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, model, questions)

    monkeypatch.setattr(MultipleChoice, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        luthier.evaluate({**keys, "save_dir": str(tmp_path)})
    assert "4 of 9 answers are kept; the same command goes on" in said
    assert luthier.evaluate({**keys, "save_dir": str(tmp_path)}).summary["n"] == 9
    assert "4 of 9 questions are answered already" in said and sum(calls[3:]) == 5


def test_other_keys_data_or_weights_do_not_go_on(keys, tmp_path, world):
    with watching(tmp_path, kill_at=5):
        luthier.evaluate({**keys, "save_dir": str(tmp_path)})
    with pytest.raises(OutputError, match="it differs in seed"):
        luthier.evaluate({**keys, "save_dir": str(tmp_path), "seed": 1})
    weights = Path(world["model_name_or_path"]) / "model.safetensors"
    weights.touch()
    with pytest.raises(OutputError, match=r"it differs in .*model\.safetensors"):
        luthier.evaluate({**keys, "save_dir": str(tmp_path)})


def test_an_adapter_is_measured_with_its_base(keys, adapter):
    base, tuned = luthier.evaluate(keys), luthier.evaluate({**keys, "adapter_name_or_path": adapter})
    assert likelihoods(base) != likelihoods(tuned) and tuned.summary["adapters"] == [adapter]


def test_an_adapter_and_its_merged_model_have_the_same_numbers(keys, adapter, tmp_path):
    shared = {name: keys[name] for name in ("model_name_or_path", "template")}
    luthier.export({**shared, "adapter_name_or_path": adapter, "export_dir": str(tmp_path)})
    tuned = luthier.evaluate({**keys, "adapter_name_or_path": adapter})
    merged = luthier.evaluate({**keys, "model_name_or_path": str(tmp_path)})
    torch.testing.assert_close(
        torch.tensor(likelihoods(merged)), torch.tensor(likelihoods(tuned)), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_quantized_model_is_measured_as_it_computes(keys, batch_size):
    """Against the logits of whole prompts, one at a time."""
    changes = {**keys, "quantization_bit": 8, "quantization_method": "hqq", "batch_size": batch_size}
    run = load_eval(changes)
    text = load_text_side(run)
    task, model = MultipleChoice(run, keys["task"]), load_eval_model(run, text)
    assert any("HQQ" in type(module).__name__ for module in model.model.modules())
    letters = text.tokenizer.convert_tokens_to_ids(list("ABCD"))
    expected = []
    for asking in task.questions(text.encoding):
        ids, _ = task._prompt(model, asking)
        with torch.inference_mode():
            logits = model.model(input_ids=torch.tensor([ids], device=model.model.device)).logits[0, -1]
        expected.append(logits.float().log_softmax(-1)[letters].cpu())
    found = torch.tensor(likelihoods(luthier.evaluate(changes)))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


class TestTheModelOfATrainingRun:
    @pytest.fixture
    def run(self, world):
        values = {name: value for name, value in world.items() if name != "folder"}
        return lambda **changes: load_eval({**values, "task": "perplexity", **changes})

    def test_its_keys_raise_no_warning(self, run):
        assert run(finetuning_type="lora", lora_rank=4, val_size=0.1).warnings == ()

    def test_it_is_the_adapter_in_output_dir(self, run, adapter):
        found = as_trained(run(finetuning_type="lora", output_dir=adapter))
        assert found.model.adapter_name_or_path == (adapter,)

    def test_it_is_the_model_in_output_dir(self, run, world):
        found = as_trained(run(output_dir=world["model_name_or_path"], model_name_or_path="base"))
        assert found.model.model_name_or_path == world["model_name_or_path"]

    def test_an_adapter_that_is_named_inside_output_dir_is_taken_as_it_is(self, run, adapter):
        given = run(finetuning_type="lora", output_dir=adapter, adapter_name_or_path=f"{adapter}/checkpoint-2")
        assert as_trained(given) == given

    def test_a_run_that_continued_an_adapter_has_the_new_one_in_its_place(self, run, adapter):
        continued = run(finetuning_type="lora", output_dir=adapter, adapter_name_or_path="first,second")
        assert as_trained(continued).model.adapter_name_or_path == ("first", adapter)
        on_top = run(
            finetuning_type="lora",
            output_dir=adapter,
            adapter_name_or_path="first,second",
            create_new_adapter=True,
        )
        assert as_trained(on_top).model.adapter_name_or_path == ("first", "second", adapter)

    def test_without_do_train_it_is_the_model_that_is_named(self, run):
        given = run(do_train=False, output_dir="nowhere")
        assert as_trained(given) == given

    def test_a_run_that_has_not_been_trained(self, run, tmp_path):
        with pytest.raises(InvalidInput, match="holds no model: this run has not been trained -> train it"):
            as_trained(run(output_dir=str(tmp_path)))


@pytest.mark.parametrize("task", ["mmlu_test", "perplexity", "generation"])
def test_a_model_that_gives_nan_has_no_result(keys, world, tmp_path, task):
    """It would choose the first letter every time, which looks like chance."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(world["model_name_or_path"], tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    own = {"model_name_or_path": str(tmp_path / "broken"), "dataset": "numbers", "do_sample": False}
    with pytest.raises(RunFailed, match="NaN -> load it with infer_dtype"):
        luthier.evaluate({**keys, **own, "task": task, "save_dir": str(tmp_path / "out")})
    assert not (tmp_path / "out" / "summary.json").exists()


def test_no_secret_is_saved(keys, tmp_path):
    luthier.evaluate({**keys, "hf_hub_token": "my-secret", "save_dir": str(tmp_path / "out")})
    assert not any(b"my-secret" in text for text in content(tmp_path / "out").values())


def test_a_checkpoint_of_the_run_may_be_named_by_its_whole_path(keys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    for name in (str(tmp_path / "out" / "checkpoint-2"), "./out/checkpoint-2"):
        run = load_eval({**keys, "do_train": True, "output_dir": "out", "adapter_name_or_path": name})
        assert as_trained(run) is run
