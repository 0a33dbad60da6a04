"""What the benchmarks compare is the same work: equal losses, equal turns; and the pages they write."""

import json
import sys

import pytest

import luthier
from benchmarks import bench_goals, bench_peers
from benchmarks.goals import inputs, reference
from benchmarks.goals.machine_peak import operations_of_lora
from benchmarks.goals.rows import PAGE, Row, between, table
from benchmarks.goals.turns import ProgramFailed, Ratio, take_turns
from tests.matrix import representatives
from tests.small_world import losses, small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    keys = small_world(tmp_path_factory.mktemp("world"))
    changes = {"finetuning_type": "lora", "lora_target": "all", "max_steps": 3, "learning_rate": 1e-2}
    return {**keys, **changes}


@pytest.mark.parametrize(
    "changes",
    representatives(
        [
            {},
            {"finetuning_type": "full"},
            {"stage": "dpo", "dataset": "pairs"},
            {"stage": "kto", "dataset": "feedback"},
            {"stage": "gkd"},
        ],
        {},
    ),
    ids=lambda changes: "-".join(changes.values()) or "sft",
)
def test_the_reference_by_hand_trains_as_luthier_does(world, tmp_path, changes):
    keys = {**world, **changes}
    if changes.get("stage") == "gkd":
        keys["teacher_model"] = small_world(tmp_path / "teacher", num_hidden_layers=3)["model_name_or_path"]
    rows = inputs.read_rows(inputs.token_rows(keys, tmp_path))
    trainer = reference.train(keys, rows, checkpointing=True)
    theirs = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    ours = losses(luthier.train(keys))
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours[0] != ours[-1]


def test_rows_of_the_benchmark_have_the_lengths_it_states(tmp_path):
    inputs.write_data(tmp_path)
    keys = {**inputs.run_keys(tmp_path, tmp_path, 2, 4)}
    assert keys["max_samples"] == 8
    for name, sides in {"texts": ("output",), "pairs": ("chosen", "rejected"), "feedback": ("output",)}.items():
        rows = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert len(rows) == inputs.NUM_ROWS
        assert all(8 <= len(row["instruction"].split()) <= 30 for row in rows)
        assert all(60 <= len(row[side].split()) <= 240 for row in rows for side in sides)


PROGRAM = """\
import sys
from benchmarks.goals.clock import Clock
clock = Clock()
for step in range(int(sys.argv[2])):
    clock.begin()
    with open(sys.argv[1], "a") as file:
        file.write(sys.argv[3])
    clock.end()
clock.losses.append(1.5)
clock.finish()
"""


def program(path, steps, letter):
    return [sys.executable, "-c", PROGRAM, str(path), str(steps), letter]


@pytest.mark.parametrize("together", [True, False])
def test_programs_take_their_steps_in_turn(tmp_path, together):
    path = tmp_path / "order"
    found = take_turns({"first": program(path, 3, "a"), "second": program(path, 3, "b")}, starts_together=together)
    assert path.read_text() == "ababab"
    for measured in found.values():
        assert len(measured.seconds) == len(measured.cpu_seconds) == 2  # the first step warms up
        assert all(0 < seconds < 5 for seconds in measured.cpu_seconds)
    assert found["first"].losses == [1.5] and found["first"].peak_bytes > 1e6


def test_a_program_that_fails_is_named_with_the_end_of_its_output(tmp_path):
    broken = [sys.executable, "-c", "raise SystemExit('no model here')"]
    with pytest.raises(ProgramFailed, match=r"(?s)broken ended with status 1.*no model here"):
        take_turns({"first": program(tmp_path / "order", 1, "a"), "broken": broken})


def test_a_program_with_fewer_steps_is_an_error(tmp_path):
    path = tmp_path / "order"
    with pytest.raises(ProgramFailed, match="first took fewer turns"):
        take_turns({"first": program(path, 1, "a"), "second": program(path, 2, "b")})


def test_ratios_are_taken_step_by_step():
    """3/1, 4/2 and 10/4 are 3, 2 and 2.5; the ratio of the sums would be 17/7."""
    assert str(Ratio.of([3.0, 4.0, 10.0], [1.0, 2.0, 4.0])) == "2.50x (2.00 to 3.00)"


def test_the_operations_of_lora_by_hand():
    """One layer, hidden 4, inner 8, two heads of 2, one of keys, vocabulary 10, rank 1; a row of 3 tokens, 2 predicted.

    Weights 4*4 + 2*4*2 + 4*4 + 3*4*8 = 144, adapters 8 + 6 + 6 + 8 + 3*12 = 64:
    4*144*3 + 4*4*10*2 + 6*64*3 + 6*4*9 = 1728 + 320 + 1152 + 216 = 3416.
    """
    config = {
        "hidden_size": 4,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 10,
    }
    row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    assert operations_of_lora(config, 1, [row]) == 3416
    alike = [{"input_ids": [*range(9), last], "labels": [-100] * 9 + [last]} for last in (1, 2)]
    once, twice = (operations_of_lora(config, 1, alike, shares=shares) for shares in (True, False))
    assert twice - once == (4 * 144 + 6 * 64) * 9, "nine tokens are computed once"


def test_a_table_takes_its_place_on_the_page_and_nothing_else():
    page = "before\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nafter\n"
    new = table([Row("sft", "2x", "2.1x", note="a | b")])
    assert between(page, "bench", new) == page.replace("old", new)
    assert new.splitlines()[-1] == "| sft | 2x | 2.1x |  |  | a / b |"
    with pytest.raises(ValueError, match="bench-peers"):
        between(page, "bench-peers", new)


@pytest.mark.parametrize("name", [bench_goals.NAME, bench_peers.NAME])
def test_the_page_has_a_place_for_each_table(name):
    text = PAGE.read_text(encoding="utf-8")
    assert "| new |" in between(text, name, "| new |")


@pytest.mark.thorough
def test_a_peer_that_cannot_be_installed_is_reported_with_the_words_of_pip(tmp_path, monkeypatch):
    peer = bench_peers.Peer((f"{tmp_path}/no-such-package",), ())
    monkeypatch.setitem(bench_peers.PEERS, "absent", peer)
    with pytest.raises(bench_peers.NotInstalled, match="no-such-package"):
        bench_peers.python_of("absent", tmp_path)


def test_a_measure_that_fails_leaves_the_others(monkeypatch, capsys, tmp_path):
    def fails(setting):
        raise ProgramFailed("luthier ended with status 1\nmore")

    monkeypatch.setattr(bench_goals, "MEASURES", {"bad": fails, "good": lambda setting: [Row("good", "1x", "2x")]})
    setting = bench_goals.Setting(tmp_path, tmp_path, lambda: tmp_path, 1)
    rows = bench_goals.run_all(["bad", "good"], setting, most_minutes=1)
    assert [row.measured for row in rows] == ["failed", "2x"]
    assert rows[0].note == "luthier ended with status 1"
    assert "more" in capsys.readouterr().err
    (late,) = bench_goals.run_all(["good"], setting, most_minutes=-1)
    assert late.measured == "not measured"


def test_pairs_become_texts_for_trl():
    """Prompt ids 1 2, answers 3 and 4, each closed by the end token 9 and a line break 5."""
    from benchmarks.peers.trl_program import pair

    class Letters:
        eos_token_id = 9

        @staticmethod
        def decode(ids):
            return "".join(map(str, ids))

    row = {
        "chosen_input_ids": [1, 2, 3, 9, 5],
        "chosen_labels": [-100, -100, 3, 9, -100],
        "rejected_input_ids": [1, 2, 4, 9, 5],
    }
    assert pair(row, Letters()) == {"prompt": "12", "chosen": "3", "rejected": "4"}
