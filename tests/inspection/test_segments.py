"""Roles and marks of a row, found in its token ids."""

import pytest

from luthier.data.rows.labels import IGNORE_INDEX
from luthier.data.templates import get_template
from luthier.inspection.segments import RoleMarks, shown_tokens
from tests.tiny import byte_tokenizer


@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3", "vicuna", "mistral", "gemma", "qwen", "phi4"])
def test_roles_are_found_and_the_text_is_whole(name):
    from luthier.data.chat.encoder import Encoder
    from luthier.data.chat.render import as_text, render
    from luthier.data.types import Message

    tokenizer, template = byte_tokenizer(), get_template(name)
    messages = (
        Message("user", "How?"),
        Message("assistant", "So."),
        Message("user", "And?"),
        Message("assistant", "No."),
    )
    ids: list[int] = []
    labels: list[int] = []
    encoder = Encoder(tokenizer)
    for turn in render(template, messages, system="Be brief.", purpose="train"):
        prompt, answer = (encoder.text(as_text(p, "<s>", "</s>")) for p in (turn.prompt, turn.answer))
        ids += prompt + answer
        labels += [IGNORE_INDEX] * len(prompt) + answer
    tokens = shown_tokens(ids, labels, tokenizer, RoleMarks(template, tokenizer))
    assert "".join(token.text for token in tokens) == tokenizer.decode(ids)
    spoken = {}
    for token in tokens:
        if not token.is_mark and token.role:
            spoken[token.role] = spoken.get(token.role, "") + token.text
    assert "".join(spoken["user"].replace("Be brief.", "").split()) == "How?And?"
    assert "".join(spoken["assistant"].split()) == "So.No."


def test_a_text_that_reads_like_a_mark_is_not_one():
    tokenizer = byte_tokenizer()
    escaped = tokenizer.encode("<|im_start|>user\n", add_special_tokens=False, split_special_tokens=True)
    marks = RoleMarks(get_template("chatml"), tokenizer)
    assert len(escaped) == 17
    assert not any(t.is_mark for t in shown_tokens(escaped, [IGNORE_INDEX] * 17, tokenizer, marks))
