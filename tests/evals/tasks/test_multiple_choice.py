"""Multiple choice with models whose answers are known, and the prompts that they are given."""

import math

import pytest

from luthier.config.load import load_eval
from luthier.evals.tasks.multiple_choice import MultipleChoice
from luthier.workflow.evaluate import load_eval_model, measure_all
from luthier.workflow.text import load_text_side
from tests.evals.small_benchmark import NUM_QUESTIONS, constant_model, write_benchmark, write_csv
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mc")
    write_benchmark(folder)
    model = tiny_llama(folder / "model", max_position_embeddings=4096)
    return {
        "model_name_or_path": str(model),
        "template": "default",
        "task": "mmlu_test",
        "task_dir": str(folder),
        "n_shot": 2,
        "infer_dtype": "float32",
    }


@pytest.fixture(scope="module")
def model_b(tmp_path_factory):
    """B always wins: p(B) = e^3 / Z with Z = e^3 + e^2 + V - 2."""
    return str(constant_model(tmp_path_factory.mktemp("b"), {"B": 3.0, "A": 2.0}))


def measured(keys, **changes):
    (found,) = measure_all(load_eval({**keys, **changes}))
    return found


def prompts(keys, **changes):
    """The prompts of all questions, as text, each with the number of examples in it."""
    run = load_eval({**keys, **changes})
    text = load_text_side(run)
    task, model = MultipleChoice(run, keys["task"]), load_eval_model(run, text)
    found = [task._prompt(model, asking) for asking in task.questions(text.encoding)]
    return [(text.tokenizer.decode(ids), count) for ids, count in found]


def test_where_b_always_wins_the_accuracy_is_the_share_of_b(keys, model_b):
    result = measured(keys, model_name_or_path=model_b)
    n = 3 * NUM_QUESTIONS
    assert {record.values["predicted"] for record in result.records} == {"B"}
    assert result.summary["n"] == n and result.summary["accuracy"] == 1 / 4
    assert result.summary["standard_error"] == pytest.approx(math.sqrt(1 / 4 * 3 / 4 / (n - 1)))
    total = math.e**3 + math.e**2 + 261 - 2
    first = result.records[0]
    assert first.subject == "sums" and first.index == 0 and first.values["answer"] == "A"
    expected = {"A": 2 - math.log(total), "B": 3 - math.log(total), "C": -math.log(total), "D": -math.log(total)}
    assert first.values["loglikelihoods"] == pytest.approx(expected, abs=1e-5)


def test_the_table_and_the_results_of_the_reference(keys, model_b):
    result = measured(keys, model_name_or_path=model_b)
    error = 100 * math.sqrt(1 / 4 * 3 / 4 / 11)
    assert result.table.splitlines() == [
        f"           STEM: 25.00 ± {error:.2f} (12 questions)",
        f"Social Sciences: 25.00 ± {error:.2f} (12 questions)",
        f"     Humanities: 25.00 ± {error:.2f} (12 questions)",
        f"        Average: 25.00 ± {100 * math.sqrt(1 / 4 * 3 / 4 / 35):.2f} (36 questions)",
    ]
    assert result.task.results(result.records)["towns"] == {str(number): "B" for number in range(12)}
    assert result.summary["categories"]["STEM"]["n"] == 12
    assert list(result.task.measures(result.records)["accuracy"].scores[:2]) == [0, 1]


def test_ten_choices_and_an_own_category(keys, model_b, tmp_path):
    folder = write_benchmark(tmp_path, "own", num_choices=10)
    (folder / "mapping.json").write_text('{"sums": {"name": "sums", "category": "mine"}}')
    result = measured(keys, model_name_or_path=model_b, task="own_test", task_dir=str(tmp_path), n_shot=0)
    assert list(result.records[0].values["loglikelihoods"]) == list("ABCDEFGHIJ")
    assert result.table.splitlines()[0].startswith("           mine: 16.67")


def test_the_prompt_of_the_reference(keys):
    (text, count), *_ = prompts(keys, n_shot=0)
    question = (
        "sums: which one is number 0?\nA. sums choice 0.0\nB. sums choice 0.1\nC. sums choice 0.2\nD. sums choice 0.3"
    )
    intro = "The following are multiple choice questions (with answers) about sums.\n\n"
    assert (text, count) == (f"Human: {intro}{question}\nAnswer:</s>\nAssistant:", 0)
    (text, _), *_ = prompts(keys, n_shot=0, lang="zh")
    assert text.startswith("Human: 以下是中国关于sums考试的单项选择题，请选出其中的正确答案。\n\nsums: which")
    assert text.endswith("D. sums choice 0.3\n答案：</s>\nAssistant:")


def test_solved_examples_are_turns_and_the_same_for_a_subject(keys):
    found = [text for text, count in prompts(keys) if count == 2]
    assert len(found) == 3 * NUM_QUESTIONS
    by_subject = [
        {text.rpartition("\nHuman:")[0] for text in found if f"about {name}." in text}
        for name in ("sums", "small towns", "trades")
    ]
    assert [len(beginnings) for beginnings in by_subject] == [1, 1, 1]
    (sums,) = by_subject[0]
    assert sums.count("Human:") == 2 and sums.count("about sums") == 1


def test_the_seed_draws_the_examples(keys):
    assert prompts(keys, seed=1) == prompts(keys, seed=1) != prompts(keys, seed=2)


def test_a_long_prompt_drops_examples_and_says_how_many(keys, tmp_path):
    short = str(tiny_llama(tmp_path / "short", max_position_embeddings=512))
    counts = [count for _, count in prompts(keys, model_name_or_path=short, n_shot=5)]
    assert min(counts) > 0 and max(counts) < 5
    result = measured(keys, model_name_or_path=short, n_shot=5)
    assert result.summary["num_dropped_examples"] == sum(5 - count for count in counts)


def test_the_batch_changes_nothing(keys):
    one, eight = (measured(keys, batch_size=size).records for size in (1, 8))
    for first, second in zip(one, eight, strict=True):
        assert first.values["loglikelihoods"] == pytest.approx(second.values["loglikelihoods"], abs=1e-5)


def test_the_first_questions_of_each_subject(keys):
    result = measured(keys, max_samples=2)
    assert [(record.subject, record.index) for record in result.records][:3] == [("sums", 0), ("sums", 1), ("towns", 0)]


def test_a_subject_with_one_question(keys, tmp_path):
    folder = write_benchmark(tmp_path)
    write_csv(folder / "data" / "test" / "sums_test.csv", [["q", "a", "b", "A"]])
    result = measured(keys, task_dir=str(tmp_path))
    assert result.summary["categories"]["STEM"] == {
        "n": 1,
        "accuracy": pytest.approx(0.5, abs=0.5),
        "standard_error": None,
    }
