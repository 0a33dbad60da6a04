"""Pairs judged in both orders by a real server with a rule, counted by hand."""

import signal
import subprocess
import sys

import pytest

from luthier.core.errors import InvalidInput
from luthier.evals.judge_client import JudgeClient
from luthier.evals.paired import score_interval
from luthier.evals.pairwise import Judgement, Pair, judge_all, messages, summary_of, verdict
from tests.evals.judge_server import always_first, by_rule, judge_server, says, the_longer

PAIRS = [
    Pair("q", "long answer", "short"),
    Pair("q", "a", "bbb"),
    Pair("q", "much longer one", "x"),
    Pair("q", "same", "same"),
    Pair("q", "abc", "xyz"),
    Pair("q", "a longer one", "b"),
]


def judged_by(answer, pairs=PAIRS):
    with judge_server(answer) as server:
        judgements = judge_all(JudgeClient(server.url, "judge", pause_seconds=0), pairs)
    summary = summary_of([(j, len(p.ours), len(p.theirs)) for j, p in zip(judgements, pairs, strict=True)])
    return judgements, summary, server


def test_a_judge_that_says_first_decides_nothing():
    judgements, summary, server = judged_by(by_rule(always_first))
    assert {judgement.outcome for judgement in judgements} == {"tie"}
    assert (summary["ties"], summary["win_rate"], summary["consistency"]) == (6, 0.5, 0.0)
    assert summary["first_share"] == 1.0
    assert summary["longer_wins"] is None
    assert len(server.requests) == 10  # five pairs in both orders; the equal answers are no question


def test_a_judge_that_prefers_the_longer():
    """Ours is longer three times, theirs once, two pairs are of equal length: (3 + 2/2) / 6."""
    judgements, summary, _ = judged_by(by_rule(the_longer))
    assert [judgement.outcome for judgement in judgements] == ["win", "loss", "win", "tie", "tie", "win"]
    assert (summary["n"], summary["wins"], summary["losses"], summary["ties"]) == (6, 3, 1, 2)
    assert summary["win_rate"] == pytest.approx(4 / 6)
    low, high = score_interval(3, 1, 6)
    assert summary["win_rate_interval"] == pytest.approx([(1 + low) / 2, (1 + high) / 2])
    assert (summary["consistency"], summary["first_share"], summary["longer_wins"]) == (1.0, 0.5, 1.0)
    assert summary["mean_length"] == pytest.approx((11 + 1 + 15 + 4 + 3 + 12) / 6)
    assert summary["mean_length_other"] == pytest.approx((5 + 3 + 1 + 4 + 3 + 1) / 6)


def test_verdicts_without_a_word_are_counted_as_ties():
    judgements, summary, _ = judged_by(lambda count, body: says("I cannot decide."), PAIRS[:2])
    assert [judgement.outcome for judgement in judgements] == ["tie", "tie"]
    assert (summary["unreadable_verdicts"], summary["consistency"], summary["first_share"]) == (4, 0.0, None)


def test_a_refusal_of_the_server_ends_it():
    with pytest.raises(InvalidInput, match="JUDGE_API_KEY"):
        judged_by(lambda count, body: (401, {}, {}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("first", "first"),
        ("The first is short, the second complete.\n\nSecond.", "second"),
        ("**tie**\n", "tie"),
        ("My verdict: [[A]]", "first"),
        ("[[B]]", "second"),
        ("first\n\nIt says more.", "first"),
        ("The first is better than the second.", ""),
        ("necktie", ""),
        ("", ""),
    ],
)
def test_how_a_verdict_is_read(text, expected):
    assert verdict(text) == expected


@pytest.mark.parametrize(
    ("ours_first", "theirs_first", "outcome", "is_consistent"),
    [
        ("ours", "ours", "win", True),
        ("theirs", "theirs", "loss", True),
        ("tie", "tie", "tie", True),
        ("ours", "theirs", "tie", False),
        ("ours", "tie", "tie", False),
        ("unreadable", "unreadable", "tie", False),
    ],
)
def test_outcomes(ours_first, theirs_first, outcome, is_consistent):
    judgement = Judgement(ours_first, theirs_first)
    assert (judgement.outcome, judgement.is_consistent) == (outcome, is_consistent)


def test_the_judge_sees_question_and_both_answers():
    shown = messages("What is 2 + 2?", "four", "five")[-1]["content"]
    assert shown.index("What is 2 + 2?") < shown.index("four") < shown.index("five")


SILENT_JUDGE = """
import socket, threading
from luthier.evals.judge_client import JudgeClient
from luthier.evals.pairwise import Pair, judge_all
from luthier.training.callbacks.interrupt import StopOnSignal

with socket.create_server(("127.0.0.1", 0)) as server, StopOnSignal():
    held = []
    def accept():
        held.append(server.accept())
        print("asked", flush=True)
    threading.Thread(target=accept, daemon=True).start()
    judge_all(JudgeClient(f"http://127.0.0.1:{server.getsockname()[1]}/v1", "judge"), [Pair("q", "a", "b")] * 9)
"""


def test_a_second_signal_does_not_wait_for_a_judge_that_is_silent():
    process = subprocess.Popen([sys.executable, "-c", SILENT_JUDGE], stdout=-1, stderr=-1, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None and any("press Ctrl-C again" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=300)[1]
        assert process.returncode != 0
    finally:
        process.kill()
