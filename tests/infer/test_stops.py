"""An answer ends at the first character of a stop string, however its pieces cut it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.infer.stops import StopStrings, before_stop

TEXT = st.text("ab", max_size=12)


def through(words, pieces):
    """(the text that came through, whether a stop string was found)"""
    stops, came = StopStrings(words), []
    for piece in pieces:
        came.append(stops.push(piece))
        if stops.found:
            return "".join(came), True
    return "".join([*came, stops.finish()]), False


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(TEXT, max_size=6))
def test_the_text_before_the_first_stop_string_comes_through(words, pieces):
    text = "".join(pieces)
    # A word that ends first is found first, even if a longer one that ends later begins before it.
    ends = [text.find(word) + len(word) for word in words if word in text]
    stopped = bool(ends)
    came, found = through(words, pieces)
    assert found == stopped
    if stopped:
        assert text.startswith(came) and not any(word in came for word in words)
        assert any(text.startswith(word, len(came)) for word in words)
    else:
        assert came == text


@given(TEXT, TEXT)
def test_characters_one_by_one_end_where_the_whole_text_ends(before, after):
    text = before + "STOP" + after
    assert through(["STOP"], text) == through(["STOP"], [text]) == (before, True)


def test_only_what_may_become_a_stop_string_is_held_back():
    stops = StopStrings(["</answer>"])
    assert [stops.push(piece) for piece in ("a < b </", "ans", "wer", "s>")] == ["a < b ", "", "", "</answers>"]


def test_an_empty_stop_string_is_a_fault_of_the_caller():
    with pytest.raises(AssertionError, match="empty stop string"):
        StopStrings([""])


def test_an_answer_of_a_row_ends_before_its_first_stop_token():
    assert before_stop([1, 2, 9, 3, 9], {9}) == [1, 2]
    assert before_stop([9], {9}) == before_stop([], {9}) == []
    assert before_stop([1, 2], {9}) == [1, 2]
