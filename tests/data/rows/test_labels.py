"""What is learned of the token ids: the budget of a turn, the labels of a conversation."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from luthier.data.chat.encoder import Encoder
from luthier.data.chat.render import render
from luthier.data.media.tokens import BlockToken
from luthier.data.rows.labels import (
    IGNORE_INDEX,
    Encoded,
    cut_prompt,
    label_answers,
    label_turns,
    split_budget,
    with_blocks_apart,
)
from luthier.data.rows.tokenize import turn_ids
from luthier.data.templates import get_template, template_names
from luthier.data.types import Message
from tests import tiny

X = IGNORE_INDEX
EOS = 9


@pytest.mark.parametrize(
    ("source", "target", "kept"),
    [
        (3000, 2000, (600, 400)),
        (2000, 3000, (400, 600)),
        (1000, 100, (900, 100)),
        (100, 1000, (100, 900)),
        (100, 500, (100, 500)),
        (500, 100, (500, 100)),
        (2000, 500, (800, 200)),  # half of the budget is not less than half
        (500, 2000, (200, 800)),
        (10, 10, (10, 10)),
        (400, 2000, (400, 600)),
    ],
)
def test_budget(source, target, kept):
    assert split_budget(source, target, 1000) == kept


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(1, 2000))
def test_budget_is_used_up(source, target, cutoff):
    """Nothing is cut that fits, the cutoff is met exactly otherwise, and a short answer is always kept whole."""
    kept_source, kept_target = split_budget(source, target, cutoff)
    assert 0 <= kept_source <= source and 0 <= kept_target <= target
    assert kept_source + kept_target == min(source + target, cutoff)
    if 2 * target < cutoff:
        assert kept_target == target


TURNS = [([1, 2], [3, 4]), ([5, 6], [7, 8])]


def test_a_prompt_that_is_cut_keeps_its_closing_marks():
    assert cut_prompt([1, 2, 3, 4, 8, 9], 4, num_marks=2) == [1, 2, 8, 9]
    assert cut_prompt([1, 2, 3, 4, 8, 9], 6, num_marks=2) == [1, 2, 3, 4, 8, 9]
    assert cut_prompt([1, 2, 3, 4, 8, 9], 1, num_marks=2) == [1]


def test_the_first_token_is_no_target():
    """Nothing stands before it that could predict it."""
    assert not Encoded([1, 2], [1, X]).has_target
    assert Encoded([1, 2], [X, 2]).has_target


def test_the_end_is_not_learned_after_a_prompt_without_its_answer():
    """Four tokens hold the first turn, one token of the second prompt, and the eos."""
    row = label_turns([([1], [2]), ([3] * 5, [4])], cutoff_len=4, eos_token_id=EOS)
    assert (row.input_ids, row.labels) == ([1, 2, 3, EOS], [X, 2, EOS, X])


def test_every_answer_is_learned():
    assert label_turns(TURNS, cutoff_len=100) == Encoded([1, 2, 3, 4, 5, 6, 7, 8], [X, X, 3, 4, X, X, 7, 8])


def test_train_on_prompt():
    row = label_turns(TURNS, cutoff_len=100, train_on_prompt=True)
    assert row.labels == row.input_ids == [1, 2, 3, 4, 5, 6, 7, 8]


def test_mask_history():
    row = label_turns(TURNS, cutoff_len=100, mask_history=True)
    assert row == Encoded([1, 2, 3, 4, 5, 6, 7, 8], [X, X, X, X, X, X, 7, 8])


def test_efficient_eos():
    """The eos stands at the very end; the first prompt token after an answer has it as its label."""
    row = label_turns(TURNS, cutoff_len=100, eos_token_id=EOS)
    assert row == Encoded([1, 2, 3, 4, 5, 6, 7, 8, EOS], [X, X, 3, 4, EOS, X, 7, 8, EOS])
    row = label_turns(TURNS, cutoff_len=100, eos_token_id=EOS, train_on_prompt=True)
    assert row.labels == row.input_ids == [1, 2, 3, 4, 5, 6, 7, 8, EOS]


def test_efficient_eos_with_masked_history_learns_nothing_earlier():
    """Unlike the reference, which labels the starts of earlier turns with eos from three turns on."""
    turns = [*TURNS, ([10], [11])]
    row = label_turns(turns, cutoff_len=100, mask_history=True, eos_token_id=EOS)
    assert row.input_ids == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, EOS]
    assert row.labels == [X] * 9 + [11, EOS]


def test_the_end_of_an_empty_answer_is_learned():
    assert label_turns([([1, 2], [])], cutoff_len=100, eos_token_id=EOS) == Encoded([1, 2, EOS], [X, X, EOS])
    short, marks = [([1, 2, 3, 8, 9], [])], {"eos_token_id": EOS, "num_marks": lambda prompt: 2}
    assert label_turns(short, cutoff_len=4, **marks).labels == [X, X, X, EOS]
    assert label_turns(short, cutoff_len=2, **marks).labels == [X, X]  # without the marks nothing has been asked


def test_the_end_is_learned_after_a_whole_answer_whatever_is_cut_of_the_history():
    """Five tokens hold one token of the first prompt, the last turn, and the eos."""
    row = label_turns(TURNS, cutoff_len=6, mask_history=True, eos_token_id=EOS)
    assert (row.input_ids, row.labels) == ([1, 5, 6, 7, 8, EOS], [X, X, X, 7, 8, EOS])


def test_turns_that_do_not_fit():
    """Cutoff 5: the first turn takes 4, the second shares one: 2 x 1 // 4 = 0 for the answer, 1 for the prompt."""
    assert label_turns(TURNS, cutoff_len=5) == Encoded([1, 2, 3, 4, 5], [X, X, 3, 4, X], 3, 2, True)
    assert label_turns(TURNS, cutoff_len=4) == Encoded([1, 2, 3, 4], [X, X, 3, 4], 4, 2, False)
    assert label_turns(TURNS, cutoff_len=5, eos_token_id=EOS) == Encoded(
        [1, 2, 3, 4, EOS], [X, X, 3, 4, EOS], 4, 2, False
    )


def test_masked_history_keeps_the_last_turn():
    """Cutoff 6: the last turn whole, then two tokens of the turn before it, all of whose labels are off."""
    row = label_turns(TURNS, cutoff_len=6, mask_history=True)
    assert row == Encoded([1, 3, 5, 6, 7, 8], [X, X, X, X, 7, 8], 2, 0, False, shortened_prompts=1)


def test_an_answer_that_is_cut_has_lost_its_end():
    row = label_turns([([1] * 4, [2] * 4)], cutoff_len=4)
    assert row == Encoded([1, 1, 2, 2], [X, X, 2, 2], 4, 2, True, shortened_prompts=1)
    row = label_turns([([1] * 4, [2] * 4)], cutoff_len=5, eos_token_id=EOS)
    assert (row.input_ids, row.labels) == ([1, 1, 2, 2, EOS], [X, X, 2, 2, X])


def test_no_limit():
    row = label_turns(TURNS, cutoff_len=None, eos_token_id=EOS)
    assert len(row.input_ids) == 9 and row.lost_tokens == 0


ids = st.lists(st.integers(10, 99), max_size=8)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(ids, ids), min_size=1, max_size=4),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, EOS]),
)
def test_labels_align(turns, cutoff_len, train_on_prompt, mask_history, eos):
    """A label is its token, or ignored, or the eos that an answer before it should have had."""
    row = label_turns(
        turns, cutoff_len=cutoff_len, train_on_prompt=train_on_prompt, mask_history=mask_history, eos_token_id=eos
    )
    assert len(row.input_ids) == len(row.labels) <= cutoff_len
    for token, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (IGNORE_INDEX, token) or (label == eos and not mask_history and not train_on_prompt)
    total = sum(len(source) + len(target) for source, target in turns)
    assert row.lost_tokens == total + (eos is not None) - len(row.input_ids) >= row.lost_labels >= 0
    assert total + (eos is not None) > cutoff_len or row.lost_tokens == 0
    assert row.lost_labels > 0 or not row.lost_terminator


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4),
    st.integers(1, 60),
    st.booleans(),
)
@example([(1, 2, 4), (1, 0, 0)], 5, False)
def test_no_turn_follows_one_that_was_cut(sizes, cutoff_len, mask_history):
    """Each turn has a prompt of text, and an answer of text and a block, whose tokens are absent together."""
    turns, number = [], 10
    for item, (asked, said, block) in enumerate(sizes):
        middle, end = number + asked, number + asked + said
        answer = [*range(middle, end), *(BlockToken.of(token, item) for token in range(end, end + block))]
        turns.append((list(range(number, middle)), answer))
        number = end + block
    kept = set(label_turns(turns, cutoff_len=cutoff_len, mask_history=mask_history).input_ids)
    is_cut = False
    for prompt, answer in reversed(turns) if mask_history else turns:
        whole = {*prompt, *answer}
        assert not is_cut or kept.isdisjoint(whole)
        is_cut = is_cut or not whole <= kept


@pytest.fixture(scope="module")
def encoder():
    return Encoder(tiny.byte_tokenizer())


MESSAGES = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "And?"), Message("assistant", "Bye"))


@pytest.mark.parametrize("name", [name for name in template_names() if name not in ("chatglm3", "yuan")])
def test_all_formats_from_text_to_labels(encoder, name):
    """What is learned of a row is the answers; many rows at once give the ids of each by itself."""
    template = get_template(name)
    turns = render(template, MESSAGES, purpose="train")
    pairs = [(encoder.pieces(turn.prompt), encoder.pieces(turn.answer)) for turn in turns]
    assert turn_ids(encoder, [turns, turns[:1]]) == [pairs, pairs[:1]]
    row = label_turns(
        pairs, cutoff_len=4096, eos_token_id=encoder.tokenizer.eos_token_id if template.efficient_eos else None
    )
    learned = [label for token, label in zip(row.input_ids, row.labels, strict=True) if label == token]
    answers = [token for _, answer in pairs for token in answer]
    assert learned == answers + ([260] if template.efficient_eos else [])


PROMPTS = st.tuples(*[st.integers(0, 6)] * 4)
"""Tokens of text, of an image, of text, and of closing marks."""


def prompt_of(sizes: tuple[int, int, int, int], first: int = 0) -> list[int]:
    """A prompt of successive numbers, with the block of an image."""
    before, block, _, _ = sizes
    ids = list(range(first, first + sum(sizes)))
    ids[before : before + block] = [BlockToken.of(token, first) for token in ids[before : before + block]]
    return ids


def must_stay(prompt: list[int], num_marks: int) -> set[int]:
    return {token for token in prompt if isinstance(token, BlockToken)} | set(prompt[len(prompt) - num_marks :])


@given(PROMPTS, st.integers(1, 9), st.integers(1, 9), st.integers(1, 40))
def test_answers_that_are_compared_share_one_budget(sizes, num_first, num_second, cutoff_len):
    """Both follow the same prompt, which keeps its image and its marks wherever an answer follows it."""
    prompt, answers = prompt_of(sizes), [list(range(100, 100 + number)) for number in (num_first, num_second)]
    rows = label_answers([(prompt, ids) for ids in answers], cutoff_len=cutoff_len, num_marks=lambda _: sizes[3])
    kept_prompts = []
    for row, answer in zip(rows, answers, strict=True):
        kept_prompt = [token for token in row.input_ids if token < 100]
        kept = answer[: row.num_labels]
        assert (row.input_ids, row.labels) == (kept_prompt + kept, [X] * len(kept_prompt) + kept)
        assert row.num_tokens == len(prompt) + len(answer) and len(row.input_ids) <= cutoff_len
        assert row.lost_labels == len(answer) - len(kept) and row.lost_terminator == (len(kept) < len(answer))
        assert row.shortened_prompts == (len(kept_prompt) < len(prompt))
        assert not kept or must_stay(prompt, sizes[3]) <= set(kept_prompt)
        kept_prompts.append(kept_prompt)
    assert kept_prompts[0] == kept_prompts[1]
    num_all = len(prompt) + max(num_first, num_second)
    assert sizes[1] or max(len(row.input_ids) for row in rows) == min(num_all, cutoff_len)
    assert num_all > cutoff_len or not any(row.lost_tokens for row in rows)


@given(st.lists(st.tuples(PROMPTS, st.integers(1, 6)), min_size=1, max_size=3), st.integers(1, 60), st.booleans())
def test_an_image_is_whole_and_followed_by_its_answer(turns, cutoff_len, mask_history):
    made = [
        (prompt_of(sizes, 100 * number), list(range(100 * number + 50, 100 * number + 50 + num_answer)))
        for number, (sizes, num_answer) in enumerate(turns)
    ]
    row = label_turns(
        made,
        cutoff_len=cutoff_len,
        mask_history=mask_history,
        num_marks=lambda prompt: turns[prompt[0] // 100][0][3] if prompt else 0,
    )
    assert row.input_ids == sorted(row.input_ids) and len(row.input_ids) <= cutoff_len
    kept = set(row.input_ids)
    for (prompt, answer), (sizes, _) in zip(made, turns, strict=True):
        needed, images = must_stay(prompt, sizes[3]), must_stay(prompt, 0)
        assert not kept & set(answer) or needed <= kept
        assert not kept & images or (images <= kept and answer[0] in kept)
    apart = with_blocks_apart(row)
    assert apart.input_ids == row.input_ids and all(type(token) is int for token in apart.input_ids)
    places = [place for place, token in enumerate(row.input_ids) if isinstance(token, BlockToken)]
    assert [place for start, end in zip(apart.blocks[::2], apart.blocks[1::2], strict=True)
            for place in range(start, end)] == places  # fmt: skip
    assert apart.items == sorted({row.input_ids[place].item for place in places})


def test_nothing_of_an_image_is_learned():
    row = Encoded([1, BlockToken.of(7, 0), BlockToken.of(7, 0), 2], [1, 7, 7, 2], weights=[0.5, 1.0, 1.0, 0.5])
    apart = with_blocks_apart(row)
    assert (apart.labels, apart.weights) == ([1, X, X, 2], [0.5, 0.0, 0.0, 0.5])
    assert (apart.blocks, apart.items) == ([1, 3], [0])
