"""How an answer continues its prompt where the template writes the two inconsistently."""

import pytest

from luthier.core.errors import RowError
from luthier.data.chat.continuation import continuation, with_thought, without_empty_thought, without_frame


@pytest.mark.parametrize(
    ("prompt", "whole", "answer"),
    [
        ("[q]bot:", "[q]bot:a<e>", "a<e>"),
        ("S [q]bot:", "[q]bot:a<e>", "a<e>"),  # the system text is in a waiting question only
        ("[q]bot:<think>\n", "[q]bot:<think>\nt\n</think>\n\na<e>", "t\n</think>\n\na<e>"),
        ("[q]bot:<think>\n", "[q]bot:<think>t</think>a<e>", "t</think>a<e>"),
        ("[q]bot:<think>\n", "[q]bot:a<e>", "\n</think>\n\na<e>"),
        ("[q]bot:<think>", "[q]bot:</think>a<e>", "</think>a<e>"),
        ("[q]bot:<think>", "[q]bot:a<e>", "</think>a<e>"),
        ("[q]bot:<think>\n\n</think>\n\n", "[q]bot:a<e>", "a<e>"),
        ("[q]bot:<think></think>", "[q]bot:<think>\n\n</think>\n\na<e>", "a<e>"),
        ("[q]bot:<think>\n", "[q]bot:a <think>b</think> c<e>", "\n</think>\n\na <think>b</think> c<e>"),
    ],
)
def test_continuation(prompt, whole, answer):
    assert continuation(prompt, whole, "[q]") == answer


def test_without_a_border_there_is_a_reason():
    with pytest.raises(RowError, match="renders the prompt differently once it has an answer"):
        continuation("[q]bot:", "something else", "[q]")


@pytest.mark.parametrize(
    ("prompt", "words", "inline", "learned"),
    [
        ("bot:", "a<e>", "", "<think>\nt\n</think>\n\na<e>"),
        ("bot:", "a<e>", "<think>t</think> ", "<think>t</think> a<e>"),
        ("bot:", "<think>\n\n</think>\n\na<e>", "", "<think>\nt\n</think>\n\na<e>"),
        ("bot:", "<think></think>a<e>", "", "<think>t</think>a<e>"),
        ("bot:", "[THINK][/THINK]a<e>", "", "[THINK]t[/THINK]a<e>"),
        ("bot:<think>\n", "a<e>", "", "t\n</think>\n\na<e>"),
        ("bot:<think>\n", "\n</think>\n\na<e>", "<think>t</think>", "t\n</think>\n\na<e>"),
        ("bot:<think>", "</think>a<e>", "", "t</think>a<e>"),
        ("bot:<think>", "a<e>", "", "t</think>a<e>"),
    ],
)
def test_a_thought_is_put_where_the_prompt_and_the_template_have_a_place(prompt, words, inline, learned):
    assert with_thought(prompt, words, "t", inline) == learned


@pytest.mark.parametrize(
    ("words", "bare"),
    [
        ("<think>\n\n</think>\n\na", "a"),
        ("<think></think>a", "a"),
        ("<think>t</think>a", "<think>t</think>a"),
        ("a <think></think>", "a <think></think>"),
    ],
)
def test_only_an_empty_thought_at_the_beginning_is_left_out(words, bare):
    assert without_empty_thought(words) == bare


def test_the_frame_of_an_answer():
    assert without_frame("bot:", "<think>\n\n</think>\n\na<e>\n", "<e>\n") == "a"
    assert without_frame("bot:<think>\n", "\n</think>\n\na<e>", "<e>") == "\n\na"
    assert without_frame("bot:", "</think> is a tag<e>", "<e>") == "</think> is a tag"


def test_a_question_that_stands_in_the_frame_too_is_found_where_it_is_asked():
    """The prompt begins otherwise once it is answered, so it is found by its end."""
    prompt, whole = "<old>system<u>?</u><bot>", "<new><u>?</u><bot>a > b<e>"
    for question in ("?", ">", "b", "o"):
        assert continuation(prompt.replace("?", question), whole.replace("?", question), question) == "a > b<e>"
    assert continuation("<u>></u><bot><think>", "<u>></u><bot></think>a<e>", ">") == "</think>a<e>"
