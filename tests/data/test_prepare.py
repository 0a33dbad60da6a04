"""Rows in = kept + dropped, every reason with its rows; mixing, blocks and evaluation rows as the keys say."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from luthier.config.load import load_train
from luthier.core.errors import DataError
from luthier.core.kinds import STAGES
from luthier.data.ledger import MAX_SHOWN_ROWS
from luthier.data.prepare import PreparedData, prepare
from luthier.data.rows.account import MAX_LISTED_ROWS
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.workflow.text import load_text_side
from tests.tiny import byte_tokenizer

HEAD, TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
NUM_FRAME_TOKENS = 1 + len("user\n") + 2 + 1 + len("assistant\n") + 2
"""Of a chatml row with one token per byte: everything but the question and the answer."""


@pytest.fixture
def dataset(tmp_path, llama_folder):
    """Writes rows as dataset `name` and returns the keys of a run over it."""

    def write(rows: list[Any], name: str = "rows", *, entry: dict[str, Any] | None = None, **changes: Any) -> dict:
        (tmp_path / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        path = tmp_path / "dataset_info.json"
        info = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**info, name: {"file_name": f"{name}.json", **(entry or {})}}), encoding="utf-8")
        values = {"model_name_or_path": str(llama_folder), "dataset_dir": str(tmp_path), "dataset": name}
        return {**values, "template": "chatml", "output_dir": str(tmp_path / "out"), **changes}

    return write


def prepared(values: dict[str, Any]) -> PreparedData:
    run = load_train(values)
    return prepare(run, STAGES.get(run.stage).rows, load_text_side(run).encoding)


def row(question: str, answer: str) -> dict[str, str]:
    return {"instruction": question, "output": answer}


def answers_of(rows: Any) -> list[str]:
    tokenizer = byte_tokenizer()
    return [tokenizer.decode([label for label in labels if label != IGNORE_INDEX]) for labels in rows["labels"]]


SHORT, LONG = row("q", "short"), row("q", "long" * 20)
CUTOFF = NUM_FRAME_TOKENS + 10


def assert_adds_up(data: PreparedData) -> None:
    for account in data.ledger.accounts.values():
        assert account.rows_in == account.kept + account.num_dropped
        assert sum(len(rows) for rows in account.dropped_rows.values()) == account.num_dropped


def test_overlong_rows_are_truncated_and_counted(dataset):
    data = prepared(dataset([SHORT, LONG, SHORT], cutoff_len=CUTOFF))
    assert_adds_up(data)
    account = data.ledger.accounts["rows"]
    num_tokens = [NUM_FRAME_TOKENS + len("q") + len(r["output"]) for r in (SHORT, LONG, SHORT)]
    lengths = [len(ids) for ids in data.train["input_ids"]]
    assert lengths == [num_tokens[0], CUTOFF, num_tokens[2]]
    assert (account.rows_in, account.kept, account.truncated) == (3, 3, 1)
    assert account.tokens == sum(lengths)
    assert account.lost_tokens == num_tokens[1] - CUTOFF
    assert account.lost_terminators == 1
    learned = [sum(label != IGNORE_INDEX for label in labels) for labels in data.train["labels"]]
    assert account.labeled_tokens == sum(learned)
    assert account.lost_labeled_tokens == len("long" * 20) + 2 - learned[1]
    assert any("1 rows truncated" in line for line in data.ledger.summary())


def test_overlong_rows_are_dropped_by_name(dataset, tmp_path):
    data = prepared(dataset([SHORT, LONG, SHORT], cutoff_len=CUTOFF, on_overlong="drop"))
    assert_adds_up(data)
    account = data.ledger.accounts["rows"]
    assert (account.rows_in, account.kept, account.truncated, account.lost_tokens) == (3, 2, 0, 0)
    assert account.dropped == {f"longer than cutoff_len {CUTOFF}": 1}
    (place,) = account.dropped_rows[f"longer than cutoff_len {CUTOFF}"]
    assert str(tmp_path / "rows.json") in place and "2" in place


def test_overlong_rows_are_split_and_nothing_learned_is_lost(dataset):
    whole = prepared(dataset([SHORT, LONG]))
    data = prepared(dataset([SHORT, LONG], cutoff_len=CUTOFF, on_overlong="split"))
    assert_adds_up(data)
    account = data.ledger.accounts["rows"]
    assert (account.rows_in, account.kept, account.truncated) == (2, 2, 0)
    assert account.split_into == len(data.train) - 1 > 1
    assert max(len(ids) for ids in data.train["input_ids"]) == CUTOFF
    pieces = data.train["input_ids"][1:]
    assert [*pieces[0], *(token for ids in pieces[1:] for token in ids[1:])] == whole.train["input_ids"][1]
    assert all(after[0] == before[-1] for before, after in itertools.pairwise(pieces))
    assert "".join(answers_of(data.train)) == "".join(answers_of(whole.train))


@pytest.mark.parametrize("cutoff_len", [2, 11, 40])
def test_each_learned_token_is_learned_once_and_pieces_without_any_are_left_out(dataset, cutoff_len):
    """No piece begins with a learned token, for there it would have no token to be predicted from."""
    data = prepared(dataset([row("q" * 60, "answer")], cutoff_len=cutoff_len, on_overlong="split"))
    assert "".join(answers_of(data.train)) == "answer<|im_end|>\n"
    for labels in data.train["labels"]:
        assert labels[0] == IGNORE_INDEX and any(label != IGNORE_INDEX for label in labels)


def test_an_overlong_row_stops_the_run_if_asked(dataset, tmp_path):
    with pytest.raises(DataError, match=r"row 2.*tokens, but cutoff_len is") as caught:
        prepared(dataset([SHORT, LONG], cutoff_len=CUTOFF, on_overlong="error"))
    assert str(tmp_path / "rows.json") in str(caught.value)


def test_a_row_of_which_nothing_learned_is_left_is_dropped(dataset):
    talks = [row("q" * 300, ""), SHORT]
    data = prepared(dataset(talks, cutoff_len=20))
    assert_adds_up(data)
    assert all(any(label != IGNORE_INDEX for label in labels[1:]) for labels in data.train["labels"])


UNUSABLE = [
    {"instruction": "no answer"},
    {"output": "no question"},
    {"instruction": 3, "output": "not a text"},
    ["not", "an", "object"],
]


def test_every_unusable_row_is_named_with_its_reason(dataset, tmp_path):
    data = prepared(dataset([SHORT, *UNUSABLE, SHORT]))
    assert_adds_up(data)
    account = data.ledger.accounts["rows"]
    assert (account.rows_in, account.kept) == (6, 2)
    places = [place for rows in account.dropped_rows.values() for place in rows]
    for number in range(2, 6):
        assert sum(f"row {number}" in place for place in places) == 1
    text = "\n".join(data.ledger.summary())
    assert "6 rows = 2 kept + 4 dropped" in text and str(tmp_path / "rows.json") in text


def test_a_dataset_without_a_usable_row_stops_with_the_reasons(dataset):
    with pytest.raises(DataError, match="dataset 'rows' has no usable row") as caught:
        prepared(dataset(UNUSABLE))
    assert str(caught.value).count("dropped:") >= 2


def test_at_most_so_many_rows_are_named_but_all_are_counted(dataset):
    data = prepared(dataset([SHORT, *[{"instruction": "q"}] * 50]))
    account = data.ledger.accounts["rows"]
    assert account.num_dropped == 50
    (places,) = account.dropped_rows.values()
    assert len(places) == MAX_LISTED_ROWS
    assert any(f"and {50 - MAX_SHOWN_ROWS} more" in line for line in data.ledger.reasons())


def test_max_samples_holds_for_every_dataset(dataset):
    dataset([row("q", f"b{n}") for n in range(9)], name="other")
    values = dataset([row("q", f"a{n}") for n in range(9)], max_samples=3, eval_dataset="other")
    data = prepared({**values, "dataset": "rows,other"})
    assert [text[:2] for text in answers_of(data.train)] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert len(data.eval[""]) == 3


MIXES = {
    "concat": "a0 a1 a2 b0 b1",
    "interleave_under": "a0 b0 a1 b1",
    "interleave_over": "a0 b0 a1 b1 a2 b0",
    "interleave_once": "a0 b0 a1 b1 a2",
}


@pytest.mark.parametrize("strategy", MIXES)
def test_datasets_are_mixed_as_the_strategy_says(dataset, strategy):
    dataset([row("q", f"b{n}") for n in range(2)], name="other")
    values = dataset([row("q", f"a{n}") for n in range(3)], mix_strategy=strategy)
    data = prepared({**values, "dataset": "rows,other"})
    assert " ".join(text[:2] for text in answers_of(data.train)) == MIXES[strategy]
    assert data.ledger.samples == {"train": len(data.train)}
    assert [account.kept for account in data.ledger.accounts.values()] == [3, 2]


@pytest.mark.parametrize(("val_size", "num_eval"), [(0.25, 5), (0.01, 1), (3, 3)])
def test_val_size_sets_a_share_or_a_number_of_rows_aside(dataset, val_size, num_eval):
    data = prepared(dataset([row("q", f"<{n}>") for n in range(20)], val_size=val_size))
    assert len(data.eval[""]) == num_eval and len(data.train) == 20 - num_eval
    assert sorted(answers_of(data.train) + answers_of(data.eval[""])) == sorted(f"<{n}><|im_end|>\n" for n in range(20))
    assert data.ledger.samples == {"train": 20 - num_eval, "eval": num_eval}


def test_val_size_must_leave_rows_to_train_on(dataset):
    with pytest.raises(DataError, match="val_size 20 takes 20 of 20 rows"):
        prepared(dataset([SHORT] * 20, val_size=20))


def test_evaluation_rows_of_each_dataset_apart(dataset):
    dataset([SHORT] * 2, name="first")
    dataset([SHORT] * 3, name="second")
    values = dataset([SHORT] * 4, eval_dataset="first,second")
    assert {name: len(rows) for name, rows in prepared(values).eval.items()} == {"": 5}
    apart = prepared({**values, "eval_on_each_dataset": True})
    assert {name: len(rows) for name, rows in apart.eval.items()} == {"first": 2, "second": 3}
    assert apart.ledger.samples == {"train": 4, "eval first": 2, "eval second": 3}


@pytest.mark.parametrize("rule", ["truncate", "drop", "split"])
def test_prompts_for_generation_belong_to_the_evaluation_rows(dataset, rule):
    """Whatever becomes of overlong rows: one prompt per evaluated example, with its own answer."""
    rows = [row(f"question {n}", f"answer {n} " * (1 + 9 * (n % 3 == 0))) for n in range(12)]
    values = dataset(rows, val_size=0.5, predict_with_generate=True, cutoff_len=80, on_overlong=rule)
    data = prepared(values)
    tokenizer = byte_tokenizer()
    evaluated = {text.split()[1] for ids in data.eval[""]["input_ids"] if "question" in (text := tokenizer.decode(ids))}
    prompts = [tokenizer.decode(ids) for ids in data.prompts[""]["input_ids"]]
    labels = [tokenizer.decode(ids) for ids in data.prompts[""]["labels"]]
    numbers = [prompt.split("question ")[1].split("<")[0] for prompt in prompts]
    assert len(set(numbers)) == len(numbers)
    assert all(label.startswith(f"answer {number}") for number, label in zip(numbers, labels, strict=True))
    assert all(prompt == f"{HEAD}question {n}{TAIL}" for prompt, n in zip(prompts, numbers, strict=True))
    if rule != "split":
        assert len(prompts) == len(data.eval[""])
    assert evaluated


def texts(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    info = {"texts": {"file_name": "texts.jsonl", "columns": {"prompt": "text"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture
def plain(tmp_path, llama_folder) -> dict[str, Any]:
    """Three texts of 60, 5 and 40 bytes; one is longer than the blocks below."""
    texts(tmp_path, ["a" * 60, "b" * 5, "c" * 40])
    values = {"model_name_or_path": str(llama_folder), "dataset_dir": str(tmp_path), "dataset": "texts", "stage": "pt"}
    return {**values, "template": "empty", "output_dir": str(tmp_path / "out")}


STREAM = "a" * 60 + "</s>" + "b" * 5 + "</s>" + "c" * 40 + "</s>"


def stream_ids() -> list[int]:
    return byte_tokenizer()(STREAM, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("packing", "size"), [(None, 32), (True, 31)])
def test_plain_texts_are_cut_into_blocks_and_nothing_before_is_lost(plain, packing, size):
    keys = {"cutoff_len": 32} | ({} if packing is None else {"packing": packing})
    data = prepared({**plain, **keys})
    stream = stream_ids()
    assert len(stream) == 108
    assert [list(ids) for ids in data.train["input_ids"]] == [
        stream[start : start + size] for start in range(0, len(stream) - size + 1, size)
    ]
    assert data.train["labels"] == data.train["input_ids"]
    assert data.ledger.leftover_tokens == len(stream) % size
    account = data.ledger.accounts["texts"]
    assert (account.rows_in, account.kept, account.truncated, account.tokens) == (3, 3, 0, 108)
    assert data.ledger.samples == {"train": 108 // size}


def test_without_packing_every_text_is_a_row(plain):
    data = prepared({**plain, "cutoff_len": 32, "packing": False})
    assert [len(ids) for ids in data.train["input_ids"]] == [32, 6, 32]
    account = data.ledger.accounts["texts"]
    assert (account.truncated, account.lost_tokens, data.ledger.leftover_tokens) == (2, 29 + 9, 0)


def test_texts_too_short_for_a_block_are_said_to_be(plain):
    with pytest.raises(DataError, match="108 tokens together, too few for one block of 512"):
        prepared({**plain, "cutoff_len": 512})


def test_the_fingerprint_is_that_of_the_rows(dataset):
    values = dataset([SHORT, LONG])
    assert prepared(values).fingerprint == prepared({**values, "learning_rate": 1.0}).fingerprint
    assert prepared(values).fingerprint != prepared({**values, "cutoff_len": CUTOFF}).fingerprint


NO_ANSWER = {"instruction": "no answer"}
LATER_FAULTS: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "val_size": ([NO_ANSWER, SHORT], {"val_size": 1}, "leaves none to train on"),
    "val_size of a stream": (
        [NO_ANSWER, SHORT],
        {"val_size": 5, "streaming": True, "max_steps": 1, "buffer_size": 9},
        "only 1 usable ones",
    ),
    "overlong": ([NO_ANSWER, SHORT, LONG], {"on_overlong": "error", "cutoff_len": CUTOFF}, "but cutoff_len is"),
    "blocks": ([{"instruction": 7}, SHORT], {"stage": "pt", "cutoff_len": 5000}, "too few for one block"),
}
"""Rows of which the first is dropped, keys, and the error that follows."""


@pytest.mark.parametrize("fault", LATER_FAULTS)
def test_an_error_after_dropped_rows_tells_of_them(dataset, fault):
    rows, keys, reason = LATER_FAULTS[fault]
    with pytest.raises(DataError, match=reason) as caught:
        prepared(dataset(rows, **keys))
    first, *others = str(caught.value).splitlines()
    assert reason in first and len(others) == 1
    assert "rows: 1 dropped: " in others[0] and "rows.json, row 1" in others[0]


def test_an_error_without_dropped_rows_is_as_it_was(dataset):
    with pytest.raises(DataError) as caught:
        prepared(dataset([SHORT], val_size=1))
    assert len(str(caught.value).splitlines()) == 1


def test_a_dropped_row_of_one_dataset_is_told_with_the_error_of_another(dataset):
    dataset([NO_ANSWER, SHORT], "first")
    values = dataset([NO_ANSWER], "second", dataset="first,second")
    with pytest.raises(
        DataError, match=r"dataset 'second' has no usable row\n  second: 1 dropped.*\n  first: 1 dropped"
    ):
        prepared(values)


Q = {"role": "user", "content": "2*3?"}
THOUGHT = {"role": "assistant", "content": "6", "reasoning_content": "two times three"}
INLINE = {"role": "assistant", "content": "<think>\ntwo times three\n</think>\n\n6"}
PLAIN = {"role": "assistant", "content": "5"}
MESSAGES: dict[str, Any] = {"formatting": "openai"}
PAIRS = {"ranking": True, "columns": {"chosen": "good", "rejected": "bad"}, **MESSAGES}
RATED = {"columns": {"messages": "messages", "kto_tag": "liked"}, **MESSAGES}
WITH_THOUGHTS: dict[str, tuple[dict[str, Any], Any, int]] = {
    "sft": (MESSAGES, lambda ask, answer: {"messages": [ask, answer, Q, answer]}, 2),
    "dpo": (PAIRS, lambda ask, answer: {"good": [ask, answer], "bad": [ask, PLAIN]}, 1),
    "rm": (PAIRS, lambda ask, answer: {"good": [ask, PLAIN], "bad": [ask, answer]}, 1),
    "kto": (RATED, lambda ask, answer: {"messages": [ask, answer], "liked": True}, 1),
    "gkd": (MESSAGES, lambda ask, answer: {"messages": [ask, answer, Q, answer]}, 2),
}
"""Stage -> (description, (question, answer) -> row, number of the row's answers that are learned)."""


@pytest.mark.parametrize(
    ("liked", "told"),
    [
        ((True, True, True), "kto_tag: 3 training rows are liked and 0 disliked"),
        ((False, False), "kto_tag: 0 training rows are liked and 2 disliked"),
        ((True, False, True), None),
    ],
)
@pytest.mark.parametrize("is_saved", [False, True])
def test_kto_rows_of_one_kind_are_a_warning(dataset, tmp_path, said, liked, told, is_saved):
    rows = [{"messages": [{**Q, "content": f"{number}?"}, PLAIN], "liked": value} for number, value in enumerate(liked)]
    values = dataset(rows, entry=RATED, stage="kto")
    if is_saved:
        values["tokenized_path"] = str(tmp_path / "tokenized")
        prepared(values)
        said.clear()
    prepared(values)
    found = [message for message in said if "kto_tag" in message]
    assert len(found) == bool(told) and all(told in message for message in found)


TEACHER = {"gkd": {"teacher_model": "t"}}


def learned_of(data: PreparedData) -> str:
    columns = [column for column in data.train.column_names if column.endswith("labels") and "kl_" not in column]
    return "|".join(text for column in columns for text in answers_of({"labels": data.train[column]}))


@pytest.mark.parametrize("stage", WITH_THOUGHTS)
@pytest.mark.parametrize("template", ["qwen3", "chatml"])
@pytest.mark.parametrize("answer", [THOUGHT, INLINE])
def test_thoughts_are_learned_in_every_stage(dataset, stage, template, answer):
    entry, row_of, num_learned = WITH_THOUGHTS[stage]
    rows = [row_of(Q, answer), row_of({**Q, "content": "And?"}, answer)]
    data = prepared(dataset(rows, entry=entry, stage=stage, template=template, **TEACHER.get(stage, {})))
    assert learned_of(data).count("<think>\ntwo times three\n</think>\n\n6<|im_end|>") == 2 * num_learned
    assert data.ledger.accounts["rows"].thoughts_left_out == 0


@pytest.mark.parametrize("stage", WITH_THOUGHTS)
@pytest.mark.parametrize(("template", "answer"), [("qwen3", THOUGHT), ("qwen3", INLINE), ("chatml", THOUGHT)])
def test_thoughts_that_the_user_does_not_want_are_counted(dataset, stage, template, answer):
    entry, row_of, num_learned = WITH_THOUGHTS[stage]
    others = ({**Q, "content": text} for text in ("And?", "So?"))
    rows = [row_of(Q, answer), row_of(next(others), answer), row_of(next(others), PLAIN | {"content": "4"})]
    values = dataset(rows, entry=entry, stage=stage, template=template, **TEACHER.get(stage, {}))
    data = prepared({**values, "enable_thinking": False})
    assert "two times three" not in learned_of(data) and "6<|im_end|>" in learned_of(data)
    assert data.ledger.accounts["rows"].thoughts_left_out == 2 * num_learned
    line = f"; {2 * num_learned} thoughts left out, since enable_thinking is false"
    assert any(line in said for said in data.ledger.summary())


@pytest.mark.parametrize("stage", WITH_THOUGHTS)
@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, 1),
        ({"enable_thinking": None}, 0),
        ({"enable_thinking": False}, 0),
        ({"template": "chatml"}, 0),
    ],
)
def test_answers_that_learn_an_empty_thought_are_counted(dataset, stage, changes, share):
    entry, row_of, _ = WITH_THOUGHTS[stage]
    other = {**PLAIN, "content": "4"}
    rows = [row_of({**Q, "content": "And?"}, other), row_of({**Q, "content": "So?"}, other)]
    values = dataset(rows, entry=entry, stage=stage, template="qwen3", **TEACHER.get(stage, {}))
    data = prepared({**values, **changes})
    num_answers = 2 * (1 if stage == "kto" else 2)
    assert data.ledger.accounts["rows"].empty_thoughts == num_answers * share
    empty = learned_of(data).count("<think>\n\n</think>\n\n")
    assert empty == num_answers * share
    line = f"; answers without a thought that learn an empty one: {num_answers} (enable_thinking: null"
    assert any(line in said for said in data.ledger.summary()) == bool(share)


def test_of_answers_with_mask_history_only_the_last_learns_an_empty_thought(dataset):
    values = dataset([{"messages": [Q, PLAIN, Q, PLAIN]}], entry=MESSAGES, template="qwen3", mask_history=True)
    data = prepared(values)
    assert data.ledger.accounts["rows"].empty_thoughts == learned_of(data).count("<think>") == 1


def test_a_thought_of_an_earlier_answer_that_is_learned_by_its_own_wish(dataset):
    """`mask_history` writes earlier answers as a server does, without thoughts: the row that loses one is named."""
    rows = [{"messages": [Q, {**THOUGHT, "train": True}, Q, PLAIN]}, {"messages": [Q, THOUGHT, Q, PLAIN]}]
    values = dataset(rows, entry=MESSAGES, template="qwen3", mask_history=True)
    data = prepared(values)
    (reason,) = data.ledger.accounts["rows"].dropped
    assert "does not write the thought of an answer" in reason and len(data.train) == 1
    assert "two times three" in learned_of(prepared({**values, "template": "chatml"}))


def test_what_is_learned_of_calls_in_the_words_of_other_tools(dataset):
    call = {"function": {"name": "now", "arguments": "{}"}}
    first = {"role": "assistant", "content": "I look.", "tool_calls": [call], "train": False}
    rows = [{"messages": [Q, first, {"role": "tool", "content": {"h": 12}}, {**PLAIN, "weight": 1}]}]
    data = prepared(dataset(rows, entry=MESSAGES, template="qwen3"))
    assert learned_of(data) == "<think>\n\n</think>\n\n5<|im_end|>\n"
    text = byte_tokenizer().decode(data.train["input_ids"][0])
    assert 'I look.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>' in text and '{"h": 12}' in text
