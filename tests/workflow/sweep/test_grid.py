"""Which runs a command line of values makes, and that the faults of all of them are told before any starts."""

import pytest

from luthier.core.errors import ConfigError, InvalidInput
from luthier.workflow.sweep.grid import axes_of, grid, split_values, unique_names
from tests.working_folder import write


@pytest.fixture
def words(folder, llama_folder):
    return [write(folder, model_name_or_path=str(llama_folder), finetuning_type="lora")]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("8", ["8"]),
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("1e-4, 3e-4", ["1e-4", "3e-4"]),
        ("[q_proj,v_proj]", ["[q_proj,v_proj]"]),
        ("[q_proj,v_proj],all", ["[q_proj,v_proj]", "all"]),
        ('{"a": 1, "b": [2, 3]},{"a": 2}', ['{"a": 1, "b": [2, 3]}', '{"a": 2}']),
        ("'a,b',c", ["a,b", "c"]),
        ("it's,b", ["it's", "b"]),
        ('["x,y"],z', ['["x,y"]', "z"]),
        ("a,", ["a", ""]),
    ],
)
def test_commas_outside_brackets_and_quotes_separate_values(text, values):
    assert split_values(text) == values


def test_words_with_several_values_are_axes_and_others_are_overrides():
    words = ["a,b.yaml", "learning_rate=1e-4,3e-4", "--lora-rank", "8,16", "--do_train", "num_train_epochs=2"]
    first, second = axes_of(words)
    assert (first.key, first.values, first.position) == ("learning_rate", ("1e-4", "3e-4"), 1)
    assert (second.key, second.values, second.position) == ("lora_rank", ("8", "16"), 3)
    (nested,) = axes_of(["--learning_rate=1", "lr_scheduler_kwargs.num_cycles=1,2"])
    assert nested.key == "lr_scheduler_kwargs.num_cycles"
    (only,) = axes_of(["--do_train", "lora_rank=8,16"])  # no value of the flag before it
    assert only.key == "lora_rank"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["run.yaml", "lora_rank=8"], "no key has several values"),
        (["run.yaml", "output_dir=a,b"], "is one folder"),
        (["run.yaml", "lora_rank=8,16", "--lora_rank", "4,2"], "several values twice"),
        (["run.yaml", "lora_rank=8,"], "between the commas is empty"),
    ],
)
def test_what_is_no_sweep(words, reason):
    with pytest.raises(InvalidInput, match=reason):
        axes_of(words)


def test_the_grid_is_every_combination(words, folder):
    runs = grid([*words, "learning_rate=1e-4,3e-4", "lora_target=[q_proj,v_proj],all", "num_train_epochs=2"])
    found = [(one.run.training["learning_rate"], one.run.adapter.lora_target) for one in runs]
    assert found == [(1e-4, ("q_proj", "v_proj")), (1e-4, ("all",)), (3e-4, ("q_proj", "v_proj")), (3e-4, ("all",))]
    assert {one.run.training["num_train_epochs"] for one in runs} == {2}
    assert [one.name for one in runs][:2] == [
        "learning_rate-1e-4_lora_target-q-proj-v-proj",
        "learning_rate-1e-4_lora_target-all",
    ]
    assert [str(one.folder) for one in runs] == [f"o/{one.name}" for one in runs]
    assert not any(one.run.training["overwrite_output_dir"] for one in runs)


def test_faults_of_all_runs_are_told_at_once(words):
    with pytest.raises(ConfigError) as caught:
        grid([*words, "lora_rank=8,x,y", "warmup_ratio=0.1,0.2", "lora_rnk=3"])
    texts = [str(problem) for problem in caught.value.problems]
    assert len(texts) == 3, texts  # one for each wrong value, and the misspelt key once for all runs
    assert sum("must be a whole number" in text and "(in" not in text for text in texts) == 2
    assert sum("lora_rnk" in text for text in texts) == 1


def test_a_fault_of_some_runs_says_of_how_many(words):
    with pytest.raises(ConfigError) as caught:
        grid([*words, "finetuning_type=lora,full", "quantization_bit=4,8"])
    (problem,) = caught.value.problems[:1]
    assert ("(in " in problem.reason and "of the 4 runs)" in problem.reason) or "full" in str(problem)


@pytest.mark.parametrize("nothing", ["", "null"])
def test_a_sweep_without_a_folder_is_refused(words, nothing):
    """Not put into the current folder, or into one with the name `null`."""
    with pytest.raises(ConfigError, match=r"output_dir: .*is missing"):
        grid([*words, "learning_rate=1e-4,3e-4", f"output_dir={nothing}"])


def test_one_run_in_two_spellings(words):
    with pytest.raises(InvalidInput, match="are the same run"):
        grid([*words, "learning_rate=1e-4,0.0001"])


def test_names_hold_no_characters_of_a_shell_and_differ():
    values = ["a b", "a/b", "a'b", "é", "../../etc/passwd", "x" * 300, "x" * 301, ""]
    names = unique_names([{"key": value} for value in values])
    assert len(set(names)) == len(values)
    assert all(name.isascii() and not set(name) & set("/ '\"$`\\=,") and len(name) < 256 for name in names)
