"""Curves are read as the log grows, and thinned without losing an extreme."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.webui.watch import MAX_POINTS, SAMPLED_LINES, Curves, console_end, seconds_of, smoothed, thinned


def line(step: int, **values: object) -> str:
    return json.dumps({"current_steps": step, "total_steps": 9, **values}) + "\n"


def test_a_growing_log_is_read_once_and_half_a_line_later(tmp_path):
    path = tmp_path / "log"
    curves = Curves(path)
    assert not curves.read() and curves.names == ()
    path.write_text(line(1, loss=3.0, lr=0.1) + line(2, loss=2.0, eval_loss=5)[:-4], "utf-8")
    assert curves.read() and curves.curve("loss") == [(1, 3.0)]
    assert not curves.read()
    with path.open("a") as file:
        file.write(line(2, loss=2.0, eval_loss=5)[-4:] + "junk\n[]\n" + line(3, loss=float("nan"), note="text"))
        file.write(line(10**400, loss=1.0) + line(3, huge=10**400, flag=True))
    assert curves.read() and curves.curve("loss") == [(1, 3.0), (2, 2.0)]
    assert curves.names == ("loss", "eval_loss", "lr") and curves.last["current_steps"] == 3


def test_a_log_that_was_written_again_is_read_again(tmp_path):
    path = tmp_path / "log"
    path.write_text(line(1, loss=3.0) + line(2, loss=2.0), "utf-8")
    curves = Curves(path)
    curves.read()
    (tmp_path / "new").write_text(line(1, loss=3.0) + line(2, loss=9.0) + line(3, loss=1.0), "utf-8")
    (tmp_path / "new").replace(path)
    assert curves.read() and curves.curve("loss") == [(1, 3.0), (2, 9.0), (3, 1.0)]


def test_speed_is_that_of_the_time_since_the_last_start(tmp_path):
    path = tmp_path / "log"
    slow = line(1, elapsed_time="0:00:10") + line(5, elapsed_time="0:10:00")
    path.write_text(slow + line(6, elapsed_time="0:00:01") + line(10, elapsed_time="0:00:03"), "utf-8")
    curves = Curves(path)
    curves.read()
    assert curves.steps_per_second == 2.0


@given(st.lists(st.floats(-9, 9), max_size=300), st.integers(4, 60))
def test_thinning_keeps_ends_and_extremes(values, limit):
    points = list(enumerate(values))
    kept = thinned(range(len(values)), values, limit)
    assert len(kept) <= limit and kept == sorted(kept) and set(kept) <= set(points)
    if points:
        assert kept[0] == points[0] and kept[-1] == points[-1]
        assert min(value for _, value in kept) == min(values) and max(value for _, value in kept) == max(values)


def test_a_hundred_thousand_steps_become_two_thousand_points(tmp_path):
    path = tmp_path / "log"
    losses = [step % 7 + 1 for step in range(100_000)]
    losses[31_415], losses[92_653] = 500, -500
    path.write_text("".join(line(step, loss=loss, lr=1e-4) for step, loss in enumerate(losses)), "utf-8")
    curves = Curves(path)
    curves.read()
    points = curves.curve("loss")
    assert len(points) == 2000 and {(31_415, 500), (92_653, -500), (0, 1), (99_999, losses[-1])} <= set(points)
    assert curves.curve("loss") is points, "thinned once for all pages"
    with path.open("a") as file:
        file.write(line(100_000, loss=2.5))
    assert curves.read() and curves.curve("loss")[-1] == (100_000, 2.5) and curves.last_value("loss") == 2.5
    assert curves.last_value("eval_loss") is None


def test_a_glance_at_a_long_log_takes_lines_of_all_its_parts_and_reading_replaces_them(tmp_path):
    path = tmp_path / "log"
    text = "".join(line(step, loss=step % 7 + 1.0, elapsed_time="0:00:09") for step in range(1, 50_001))
    path.write_text(text + line(50_001, loss=1.0)[:-5], "utf-8")
    curves = Curves(path)
    curves.glance()
    seen = curves.curve("loss")
    assert curves.is_sample and len(seen) == SAMPLED_LINES + 1 and seen[0] == (1, 2.0) and seen[-1][0] == 50_000
    assert all(value == step % 7 + 1 for step, value in seen)
    assert max(later - step for (step, _), (later, _) in pairwise(seen)) < 2 * 50_000 / SAMPLED_LINES
    version = curves.version
    curves.glance()
    assert curves.version == version, "nothing is read twice"
    assert curves.read() and not curves.is_sample and curves.last_value("loss") == 50_000 % 7 + 1
    whole = Curves(path)
    whole.read()
    assert curves.curve("loss") == whole.curve("loss") and len(whole.curve("loss")) == MAX_POINTS
    with path.open("a") as file:
        file.write(line(50_001, loss=1.0)[-5:])
    curves.glance()
    assert curves.curve("loss")[-1] == (50_001, 1.0) and not curves.is_sample


def test_a_glance_at_a_short_log_reads_it(tmp_path):
    curves = Curves(tmp_path / "log")
    curves.glance()
    curves.path.write_text(line(1, loss=3.0), "utf-8")
    curves.glance()
    assert curves.curve("loss") == [(1, 3.0)] and not curves.is_sample


def test_smoothing_keeps_a_constant_and_starts_without_bias():
    assert smoothed([(1, 2.0), (2, 4.0)], 0) == [(1, 2.0), (2, 4.0)]
    assert [value for _, value in smoothed([(n, 3.0) for n in range(9)], 0.9)] == pytest.approx([3.0] * 9)
    assert smoothed([(1, 2.0), (2, 4.0)], 0.5)[1][1] == pytest.approx((0.5 * 0.5 * 2 + 0.5 * 4) / 0.75)


@pytest.mark.parametrize(
    ("text", "seconds"), [("0:00:07", 7), ("1 day, 2:03:04", 93784), ("12 days, 0:00:00", 1036800), ("soon", None)]
)
def test_times_are_read(text, seconds):
    assert seconds_of(text) == seconds


def test_the_end_of_the_console_has_no_colors_and_one_state_of_a_progress_line(tmp_path):
    path = tmp_path / "console.log"
    assert console_end(path) == ""
    path.write_bytes(b"\x1b[1mone\x1b[0m\n 10%\r 20%\r 30%\nlast \xff")
    assert console_end(path) == "one\n 30%\nlast \N{REPLACEMENT CHARACTER}"
    path.write_text("x" * 200_000 + "\n" + "y\n" * 500, "utf-8")
    assert console_end(path).count("y") == 399  # and the empty line behind the last break


def test_a_line_that_is_nested_without_end_is_left_out(tmp_path):
    (tmp_path / "log").write_text('{"current_steps": 1, "loss": 2.0}\n' + "[" * 9999 + "\n", "utf-8")
    curves = Curves(tmp_path / "log")
    assert curves.read() and curves.curve("loss") == [(1, 2.0)]


@pytest.mark.parametrize("place", range(41))
def test_thinning_keeps_an_extreme_wherever_it_is(place):
    """At the edges of stretches too."""
    for extreme in (5.0, -5.0):
        values = [0.0] * 41
        values[place] = extreme
        assert (place, extreme) in thinned(range(41), values, 10)
