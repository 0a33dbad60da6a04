"""Tasks of lm-evaluation-harness from local files, against the harness with its own model of transformers."""

import json
import re

import pytest
from transformers import AutoModelForCausalLM

import luthier
from luthier.core import versions
from luthier.core.errors import DataError, MissingExtra
from tests.killing import watching
from tests.tiny import byte_tokenizer, tiny_llama

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")

TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
num_fewshot: 2
fewshot_split: train
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} and so on and on"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["2"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    rows = [
        {"question": f"Which one is number {n}?", "choices": ["zero", "one or so", f"{n} exactly"], "label": n % 3}
        for n in range(12)
    ]
    for split in ("train", "test"):
        (folder / f"{split}.json").write_text("\n".join(map(json.dumps, rows)))
    files = json.dumps({split: str(folder / f"{split}.json") for split in ("train", "test")})
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {files}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text)
    model = tiny_llama(folder / "model", max_position_embeddings=300)
    return {
        "model_name_or_path": str(model),
        "template": "default",
        "infer_dtype": "float32",
        "task_dir": str(folder),
        "task": f"harness/{','.join(TASKS)}",
        "max_samples": 6,
        "batch_size": 1,
    }


@pytest.fixture(scope="module")
def theirs(keys):
    """The results of the harness with its own model."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = AutoModelForCausalLM.from_pretrained(keys["model_name_or_path"])
    return lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=2, max_length=300),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=keys["task_dir"], include_defaults=False),
        limit=6,
        bootstrap_iters=1000,
    )


@pytest.fixture(scope="module")
def ours(keys):
    return luthier.evaluate(keys)


def test_the_metrics_are_those_of_the_harness(ours, theirs):
    for name in TASKS:
        expected = {
            key.removesuffix(",none"): value
            for key, value in theirs["results"][name].items()
            if "," in key and isinstance(value, float)
        }
        assert expected and ours.summary["metrics"][name] == pytest.approx(expected, rel=1e-5), name


def test_the_answers_are_those_of_the_harness(ours, theirs):
    for name in TASKS:
        mine = [record.values["answers"] for record in ours.records if record.subject == name]
        for own, sample in zip(mine, theirs["samples"][name], strict=True):
            for answers, expected in zip(own, sample["resps"], strict=True):
                assert len(answers) == len(expected) == 1
                if name == "choices":
                    assert answers[0][0] == pytest.approx(expected[0][0], rel=1e-6) and answers[0][1] == expected[0][1]
                elif name == "texts":
                    assert answers[0] == pytest.approx(expected[0], rel=1e-6)
                else:
                    assert answers == expected


def task_of(evaluation):
    (measured,) = evaluation.tasks.values()
    return measured.task


def test_each_document_has_its_scores(ours, theirs):
    found = [record.values["scores"]["acc"] for record in ours.records if record.subject == "choices"]
    assert found == [sample["acc"] for sample in theirs["samples"]["choices"]]
    measures = task_of(ours).measures(ours.records)
    assert list(measures) == ["choices acc", "choices acc_norm", "answers exact_match"]
    assert measures["choices acc"].value == theirs["results"]["choices"]["acc,none"]


def test_the_table_and_the_results(ours):
    assert re.search(r"\|choices\s*\|.*\|\s*2\|acc ", ours.table)
    assert task_of(ours).results(ours.records)["results"]["choices"]["alias"] == "choices"
    assert ours.summary["n"] == 18 and ours.summary["n_shot"]["choices"] == 2


def test_n_shot_is_read_where_it_is_given(keys):
    assert luthier.evaluate({**keys, "task": "harness/choices", "n_shot": 1}).summary["n_shot"] == {"choices": 1}


def test_killed_at_a_write_the_same_command_ends_with_the_same_files(keys, tmp_path):
    changes = {**keys, "task": "harness/choices", "max_samples": None}

    def content(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    luthier.evaluate({**changes, "save_dir": str(tmp_path / "whole")})
    folder = tmp_path / "out"
    with watching(folder, kill_at=6):
        luthier.evaluate({**changes, "save_dir": str(folder)})
    assert (folder / "results.jsonl").exists() and not (folder / "summary.json").exists()
    luthier.evaluate({**changes, "save_dir": str(folder)})
    assert content(folder) == content(tmp_path / "whole")


@pytest.mark.thorough
def test_a_name_that_the_harness_does_not_know(keys):
    with pytest.raises(
        DataError, match=r"task: harness/choises: lm_eval has no task of this name -> did you mean choices"
    ):
        luthier.evaluate({**keys, "task": "harness/choises"})


def test_without_the_library(keys, monkeypatch):
    monkeypatch.setattr(versions, "is_installed", lambda name: name != "lm_eval")
    with pytest.raises(MissingExtra, match=r"needs the library `lm_eval`.*pip install 'luthier\[harness\]'"):
        luthier.evaluate(keys)
