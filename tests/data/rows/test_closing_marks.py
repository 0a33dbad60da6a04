"""A prompt that is cut loses text of the question and keeps the marks that open the answer, in every chat format."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import RowError
from luthier.core.kinds import STAGES
from luthier.data.chat.encoder import Encoder
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.chat.template_slots import template_from_slots
from luthier.data.packing.kl_pairs import MismatchedPairs
from luthier.data.plans.dialogues import DIALOGUES
from luthier.data.plans.feedback import FEEDBACK
from luthier.data.plans.pairs import PAIRS
from luthier.data.rows.closing_marks import closing_marks, num_closing_marks
from luthier.data.rows.encoding import Encoding, encode_last_turns
from luthier.data.rows.labels import IGNORE_INDEX, label_turns
from luthier.data.rows.maker import encoded_rows
from luthier.data.rows.row_plan import RowPlan, RowSettings
from luthier.data.rows.table import Table
from luthier.data.rows.tokenize import turn_ids
from luthier.data.templates import Token, get_template, template_names
from luthier.data.types import Dialogue, Feedback, Message, Preference
from tests import tiny
from tests.chat_programs import PROGRAMS, tokenizer_with

QUESTION, ANSWER = "x" * 300, "Yes."
NUM_KEPT = 150
"""Characters of the question that stay."""


def named(template: str, cutoff_len: int | None = None) -> Encoding:
    tokenizer, chosen = tiny.byte_tokenizer(), get_template(template)
    slots = (chosen.prefix, chosen.system, chosen.user, chosen.assistant, chosen.call_slots, chosen.observation)
    own = [piece.text for slot in slots for piece in slot if isinstance(piece, Token)]
    tokenizer.add_tokens(own, special_tokens=True)
    return Encoding(Encoder(tokenizer), chosen, cutoff_len)


def own(program: str, cutoff_len: int | None = None) -> Encoding:
    tokenizer = tokenizer_with(program)
    encoder = Encoder(tokenizer)
    return Encoding(encoder, template_from_slots(tokenizer), cutoff_len, model_template=ModelChatTemplate(encoder))


def limited(encoding: Encoding, cutoff_len: int) -> Encoding:
    return Encoding(encoding.encoder, encoding.template, cutoff_len, model_template=encoding.model_template)


def rows_of(plan: RowPlan, example: Any, encoding: Encoding, **chosen: bool) -> list[Any]:
    written = tuple(plan.write(example, encoding, RowSettings(**chosen)))
    turns = [turn_ids(encoding.encoder, row) for row in written]
    return [
        part for row in encoded_rows(plan, example, written, turns, encoding, RowSettings(**chosen)) for part in row
    ]


def decoded(encoding: Encoding, ids: list[int]) -> str:
    return encoding.encoder.tokenizer.decode(ids, skip_special_tokens=False)


FORMATS = [*((named, name) for name in template_names()), *((own, name) for name in PROGRAMS)]
ANSWERED = (Message("user", QUESTION), Message("assistant", ANSWER))
TALK = Dialogue(ANSWERED)
EXAMPLES = {
    "sft": (DIALOGUES, TALK, {}),
    "sft of the last answer": (DIALOGUES, TALK, {"mask_history": True}),
    "sft with weights": (DIALOGUES, Dialogue((ANSWERED[0], Message("assistant", ANSWER, 0.5))), {}),
    "pairs": (PAIRS, Preference(ANSWERED[:1], ANSWERED[1], Message("assistant", "Nay.")), {}),
    "feedback": (FEEDBACK, Feedback(ANSWERED, liked=True), {}),
}


@pytest.mark.parametrize(("kind", "name"), FORMATS, ids=lambda value: getattr(value, "__name__", value))
def test_only_text_of_the_question_is_lost(kind, name):
    """The row is the whole row without the last characters of the question."""
    encoding = kind(name)
    for case, (plan, example, chosen) in EXAMPLES.items():
        for number, whole in enumerate(rows_of(plan, example, encoding, **chosen)):
            text = decoded(encoding, whole.input_ids)
            cut = rows_of(plan, example, limited(encoding, len(whole.input_ids) - 300 + NUM_KEPT), **chosen)[number]
            assert decoded(encoding, cut.input_ids) == text.replace(QUESTION, "x" * NUM_KEPT), case
            assert [label for label in cut.labels if label != IGNORE_INDEX] == [
                label for label in whole.labels if label != IGNORE_INDEX
            ]
            assert (cut.shortened_prompts, cut.lost_tokens, cut.lost_labels) == (1, 300 - NUM_KEPT, 0)


@pytest.mark.parametrize(("kind", "name"), FORMATS, ids=lambda value: getattr(value, "__name__", value))
def test_prompts_for_generation_keep_their_marks(kind, name):
    encoding = kind(name)
    (whole,) = encode_last_turns([TALK], encoding)
    budget = len(whole.input_ids) + len(whole.labels) - 300 + NUM_KEPT
    (cut,) = encode_last_turns([TALK], limited(encoding, budget))
    assert decoded(encoding, cut.input_ids) == decoded(encoding, whole.input_ids).replace(QUESTION, "x" * NUM_KEPT)
    assert cut.labels == whole.labels


@pytest.mark.parametrize("thinks", [True, False, None])
@pytest.mark.parametrize("name", ["qwen3", "glm4_moe", "hunyuan"])
def test_an_empty_thought_in_the_prompt_is_one_of_the_marks(thinks, name):
    base = named(name)
    encoding = base.with_thinking(thinks)
    (whole,) = rows_of(DIALOGUES, TALK, encoding)
    cutoff_len = len(whole.input_ids) - 300 + NUM_KEPT
    short = Encoding(encoding.encoder, encoding.template, cutoff_len, enable_thinking=thinks)
    (cut,) = rows_of(DIALOGUES, TALK, short)
    expected = decoded(encoding, whole.input_ids).replace(QUESTION, "x" * NUM_KEPT)
    assert decoded(encoding, cut.input_ids) == expected


def test_the_result_of_a_tool_is_cut_before_its_marks():
    encoding = named("glm4")
    turn = (Message("user", "?"), Message("function", '{"name": "f", "arguments": {}}'))
    talk = Dialogue((*turn, Message("observation", QUESTION), ANSWERED[1]))
    (whole,) = rows_of(DIALOGUES, talk, encoding)
    (cut,) = rows_of(DIALOGUES, talk, limited(encoding, len(whole.input_ids) - 300 + NUM_KEPT))
    assert decoded(encoding, cut.input_ids) == decoded(encoding, whole.input_ids).replace(QUESTION, "x" * NUM_KEPT)


MARKS = (7, 8, 9)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=3),
    st.integers(1, 60),
    st.booleans(),
    st.booleans(),
)
def test_no_answer_stands_without_the_marks_before_it(sizes, cutoff_len, mask_history, train_on_prompt):
    """Prompts are tokens 1 with the marks 7, 8, 9, answers are tokens 2: before the first 2 there is always 7, 8, 9."""
    turns = [([1] * prompt + [*MARKS], [2] * answer) for prompt, answer in sizes]
    row = label_turns(
        turns,
        cutoff_len=cutoff_len,
        mask_history=mask_history,
        train_on_prompt=train_on_prompt,
        num_marks=lambda prompt: num_closing_marks(prompt, (MARKS,)),
    )
    assert len(row.input_ids) <= cutoff_len
    begins = [i for i, (a, b) in enumerate(zip([0, *row.input_ids], row.input_ids, strict=False)) if b == 2 != a]
    assert all(tuple(row.input_ids[i - 3 : i]) == MARKS for i in begins)


def test_a_pair_without_room_for_the_marks_learns_nothing():
    """Of the two answers nothing is left, so they are the same."""
    (marks,) = closing_marks(named("chatml").encoder, get_template("chatml"), None)
    for cutoff_len in range(1, len(marks) + 1):
        with pytest.raises(RowError, match="the same up to cutoff_len"):
            rows_of(PAIRS, EXAMPLES["pairs"][1], limited(named("chatml"), cutoff_len))
    for part in rows_of(PAIRS, EXAMPLES["pairs"][1], limited(named("chatml"), len(marks) + 1)):
        assert tuple(part.input_ids[:-1]) == marks and part.num_labels == 1


def test_a_token_across_the_end_of_the_text_counts_as_a_mark():
    """The text ends in a newline, which the tokenizer joins with that of the marks: 21 is `\\n\\n`, 20 is `\\n`."""
    assert num_closing_marks([1, 1, 21, 8, 9], ((20, 8, 9),)) == 3
    assert num_closing_marks([1, 1, 20, 8, 9], ((20, 8, 9), (8, 9))) == 3
    assert num_closing_marks([1, 1, 8, 9], ((20, 8, 9), (8, 9))) == 2
    assert num_closing_marks([1, 1], ()) == 0
    assert num_closing_marks([1, 1], ((),)) == 0


def test_mismatched_pairs_keep_the_marks():
    """The prompt of 20 tokens with the answer of 8 to the other one, within 15: 2 x 8 > 15, 15 x 8 // 28 = 4 for it."""
    import pyarrow as pa

    prompts, answers = [[1] * 17 + [*MARKS], [3, *MARKS]], [[2] * 2, [2] * 8]
    rows = Table(
        pa.Table.from_pydict(
            {
                "input_ids": [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
                "labels": [
                    [IGNORE_INDEX] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)
                ],
                "kto_tags": [[1], [0]],
            }
        )
    )
    (batch,) = MismatchedPairs(15, (MARKS,)).join(rows)
    assert batch[2].to_pylist()[0] == [1] * 8 + [*MARKS] + [2] * 4


def test_kto_gives_its_pairs_the_marks_of_the_format(tmp_path):
    encoding = named("chatml")
    (ending,) = closing_marks(encoding.encoder, encoding.template, None)
    assert decoded(encoding, list(ending)) == "<|im_end|>\n<|im_start|>assistant\n"
    run = type("Run", (), {"data": type("Data", (), {"cutoff_len": 100})})
    assert STAGES.get("kto").rows.packer(run, encoding) == MismatchedPairs(100, (ending,))
