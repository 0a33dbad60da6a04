"""Which files are questions, and the one sentence for each that is not."""

import re

import pytest

from luthier.core.errors import DataError
from luthier.evals.question_files import NAME, read_benchmark
from tests.evals.small_benchmark import MAPPING, NUM_EXAMPLES, NUM_QUESTIONS, row_of, write_benchmark, write_csv


@pytest.fixture
def mmlu(tmp_path):
    return write_benchmark(tmp_path)


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ("mmlu_test", ("mmlu", "test")),
        ("ceval_validation", ("ceval", "validation")),
        ("my_own_questions_dev", ("my_own_questions", "dev")),
        ("perplexity", None),
        ("mmlu", None),
        ("harness/mmlu_test", None),
    ],
)
def test_the_name_of_a_task(task, parts):
    match = NAME.fullmatch(task)
    assert (match and match.groups()) == parts


def test_a_benchmark_is_read(tmp_path, mmlu):
    found = read_benchmark(tmp_path, "mmlu_test", with_examples=True)
    assert [subject.key for subject in found.subjects] == list(MAPPING)
    first = found.subjects[0]
    assert len(first.questions) == NUM_QUESTIONS and len(first.examples) == NUM_EXAMPLES
    assert first.questions[1].text == "sums: which one is number 1?" and first.questions[1].answer == "B"
    assert first.questions[1].choices[2] == "sums choice 1.2" and first.questions[1].letters == "ABCD"
    assert found.subjects[1].name == "small towns" and found.subjects[1].category == "Humanities"


def test_the_hash_is_that_of_the_content(tmp_path, mmlu):
    before = read_benchmark(tmp_path, "mmlu_validation", with_examples=True).hashes
    assert read_benchmark(tmp_path, "mmlu_validation", with_examples=True).hashes == before
    write_csv(mmlu / "data" / "val" / "sums_val.csv", [row_of("sums", 3)])
    assert read_benchmark(tmp_path, "mmlu_validation", with_examples=True).hashes != before


def test_texts_with_commas_quotes_and_line_breaks(tmp_path, mmlu):
    row = ["Which,\none?", 'a "b", c', "d", "e", "f", " C "]
    write_csv(mmlu / "data" / "test" / "sums_test.csv", [row])
    (question,) = read_benchmark(tmp_path, "mmlu_test", with_examples=False).subjects[0].questions
    assert question.text == "Which,\none?" and question.choices[0] == 'a "b", c' and question.answer == "C"


def test_ten_choices(tmp_path):
    write_benchmark(tmp_path, "pro", num_choices=10)
    question = read_benchmark(tmp_path, "pro_test", with_examples=False).subjects[0].questions[9]
    assert question.letters == "ABCDEFGHIJ" and question.answer == "J"


GOOD = row_of("sums", 0)
FAULTS = [
    ([[*GOOD[:-1], "K"]], "line 1: the answer is 'K' and must be a letter from A to D -> correct it"),
    ([[*GOOD[:-1], "E"]], "line 1: the answer is 'E' and must be a letter from A to D"),
    ([["question", "A", "B", "C", "D", "answer"], GOOD], "line 1: the answer is 'answer'"),
    ([GOOD, [*GOOD, "A"]], 'line 2: there are 7 columns, and 6 in the lines before -> put "..." around texts'),
    ([["only a question", "A"]], "line 1: there are 2 columns -> write question, 2 to 10 choices, answer"),
    ([["nothing else"]], "line 1: there are 1 columns -> write question, 2 to 10 choices, answer"),
    ([["q", *"abcdefghijk", "A"]], "line 1: there are 13 columns -> write question, 2 to 10 choices, answer"),
    ([], "there are no questions in this file -> leave the subject out of mapping.json"),
]


@pytest.mark.parametrize(("rows", "sentence"), FAULTS, ids=[sentence[:40] for _, sentence in FAULTS])
def test_a_file_that_holds_no_questions(tmp_path, mmlu, rows, sentence):
    path = write_csv(mmlu / "data" / "test" / "sums_test.csv", rows)
    with pytest.raises(DataError, match=re.escape(f"{path}: {sentence}")):
        read_benchmark(tmp_path, "mmlu_test", with_examples=False)


def test_files_that_are_missing(tmp_path, mmlu):
    with pytest.raises(DataError, match=r"there is no folder .*mmlux -> did you mean mmlu\?"):
        read_benchmark(tmp_path, "mmlux_test", with_examples=False)
    with pytest.raises(
        DataError, match=r"there is no folder .*nowhere/mmlu -> set task_dir to the folder that holds mmlu/"
    ):
        read_benchmark(tmp_path / "nowhere", "mmlu_test", with_examples=False)
    (mmlu / "data" / "dev" / "towns_dev.csv").unlink()
    read_benchmark(tmp_path, "mmlu_test", with_examples=False)
    with pytest.raises(
        DataError, match=r"towns_dev\.csv: cannot be read .* -> solved examples come from it; n_shot: 0"
    ):
        read_benchmark(tmp_path, "mmlu_test", with_examples=True)
    (mmlu / "data" / "test" / "towns_test.csv").unlink()
    with pytest.raises(DataError, match=r"towns_test\.csv: cannot be read .* -> each subject of mapping\.json needs"):
        read_benchmark(tmp_path, "mmlu_test", with_examples=False)
    (mmlu / "mapping.json").unlink()
    with pytest.raises(DataError, match=r"mapping\.json: cannot be read .* -> it lists the subjects"):
        read_benchmark(tmp_path, "mmlu_test", with_examples=False)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "this is not valid JSON"),
        ("[]", "must be a JSON object with at least one subject"),
        ('{"sums": "STEM"}', 'the subject \'sums\' must have texts "name" and "category"'),
    ],
)
def test_a_mapping_that_is_none(tmp_path, mmlu, text, sentence):
    (mmlu / "mapping.json").write_text(text)
    with pytest.raises(DataError, match=sentence):
        read_benchmark(tmp_path, "mmlu_test", with_examples=False)


def test_a_file_in_another_encoding(tmp_path, mmlu):
    (mmlu / "data" / "test" / "sums_test.csv").write_bytes("Où?,a,b,c,d,A".encode("latin-1"))
    with pytest.raises(DataError, match="this is not UTF-8 text"):
        read_benchmark(tmp_path, "mmlu_test", with_examples=False)


def test_the_mark_of_a_program_at_the_start_of_a_file_is_no_part_of_its_first_question(tmp_path, mmlu):
    """Spreadsheets write a byte order mark."""
    before = read_benchmark(tmp_path, "mmlu_test", with_examples=False).subjects
    for path in (mmlu / "data" / "test").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_benchmark(tmp_path, "mmlu_test", with_examples=False).subjects == before
