"""Rows that are read while training: their order, their shares, and the account that travels with them."""

import json
import pickle
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from luthier.config.load import load_train
from luthier.core.errors import ConfigError, DataError
from luthier.core.kinds import STAGES
from luthier.data.chat.encoder import Encoder
from luthier.data.ledger import Ledger
from luthier.data.prepare import PreparedData, prepare
from luthier.data.rows.encoding import Encoding
from luthier.data.stream import StreamedRows
from luthier.data.templates import get_template
from tests.matrix import representatives
from tests.tiny import byte_tokenizer

NUM_ROWS = 30


@pytest.fixture
def world(tmp_path):
    """`prepared(**keys)`: the data of a streamed run; its `source` is the file of rows."""

    class World:
        folder = tmp_path
        source = tmp_path / "d.jsonl"

        def __init__(self) -> None:
            self.write(
                [{"instruction": f"question {number}", "output": f"answer {number}"} for number in range(NUM_ROWS)]
            )
            (tmp_path / "e.txt").write_text("".join(f"a line of text, number {number}\n" for number in range(NUM_ROWS)))
            info = {
                "d": {"file_name": "d.jsonl"},
                "e": {"file_name": "e.txt", "columns": {"prompt": "text"}},
                "pairs": {
                    "file_name": "pairs.jsonl",
                    "ranking": True,
                    "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
                },
            }
            pairs = [{"instruction": f"q{number}", "chosen": "good", "rejected": "bad"} for number in range(NUM_ROWS)]
            (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
            (tmp_path / "dataset_info.json").write_text(json.dumps(info))

        def write(self, rows: list[Any]) -> None:
            self.source.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))

        def run(self, **keys: Any):
            base = {
                "model_name_or_path": "m",
                "dataset": "d",
                "dataset_dir": str(tmp_path),
                "template": "chatml",
                "do_train": True,
                "output_dir": "o",
                "streaming": True,
                "max_steps": 5,
                "buffer_size": 8,
            }
            return load_train({**base, **keys})

        def prepared(self, **keys: Any) -> PreparedData:
            run = self.run(**keys)
            encoding = Encoding(Encoder(byte_tokenizer()), get_template("chatml"), run.data.cutoff_len)
            return prepare(run, STAGES.get(run.stage).rows, encoding)

        def stream(self, **keys: Any) -> StreamedRows:
            rows = self.prepared(**keys).train
            assert isinstance(rows, StreamedRows)
            return rows

    return World()


def texts(rows) -> list[str]:
    tokenizer = byte_tokenizer()
    return [tokenizer.decode(row["input_ids"]) for row in rows]


def numbers(rows) -> list[int]:
    """The numbers of the questions, in order."""
    return [int(text.split("question ")[1].split("<")[0]) for text in texts(rows)]


def take(rows: StreamedRows, count: int) -> list[dict[str, Any]]:
    return [item.row for item in islice(rows, count)]


def test_rows_are_those_of_the_tables_in_another_order(world):
    streamed, ledger = world.stream().first(None)
    tables = world.prepared(streaming=False, max_steps=-1).train
    assert sorted(map(repr, streamed)) == sorted(map(repr, tables))
    assert numbers(streamed) != list(range(NUM_ROWS))
    assert ledger.accounts["d"].rows_in == ledger.accounts["d"].kept == NUM_ROWS
    assert ledger.accounts["d"].tokens == sum(len(row["input_ids"]) for row in streamed)


def test_pass_follows_pass_in_other_orders_that_the_seed_decides(world):
    found = numbers(take(world.stream(), 3 * NUM_ROWS))
    passes = [found[start : start + NUM_ROWS] for start in range(0, len(found), NUM_ROWS)]
    assert [sorted(rows) for rows in passes] == [list(range(NUM_ROWS))] * 3
    assert passes[0] != passes[1] != passes[2]
    assert numbers(take(world.stream(), 3 * NUM_ROWS)) == found
    assert numbers(take(world.stream(seed=1), 3 * NUM_ROWS)) != found


def test_what_a_checkpoint_says_of_the_order_tells_another_order(world):
    """`data_seed` seeds the shuffle buffer; one that is equal to `seed` changes nothing."""

    def order(**keys):
        rows = world.stream(**keys)
        return rows.order, numbers(take(rows, NUM_ROWS))

    assert order(data_seed=42) == order()
    assert all(other != same for other, same in zip(order(data_seed=7), order(), strict=True))


def test_without_shuffling_the_order_is_that_of_the_files(world):
    assert numbers(take(world.stream(disable_shuffling=True), NUM_ROWS + 2)) == [*range(NUM_ROWS), 0, 1]


def test_batches_of_tokenizing_do_not_change_rows(world):
    assert take(world.stream(preprocessing_batch_size=3), 50) == take(world.stream(), 50)


@pytest.mark.parametrize("num_processes", [1, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_processes_and_workers_share_the_rows_of_a_pass(world, num_processes, num_workers):
    num_shares = num_processes * max(num_workers, 1)
    found: list[int] = []
    for process in range(num_processes):
        rows = world.stream()
        rows.process, rows.num_processes = process, num_processes
        loader = DataLoader(rows, batch_size=5, num_workers=num_workers, collate_fn=list)
        items = [item for batch in islice(loader, NUM_ROWS // num_processes // 5) for item in batch]
        found += numbers(item.row for item in items)
    assert NUM_ROWS % num_shares == 0
    assert Counter(found) == Counter(range(NUM_ROWS))


@pytest.mark.parametrize(("num_processes", "num_workers"), representatives([(2, 0), (3, 2), (5, 0)], (2, 0)))
def test_a_dataset_of_several_files_is_shared_row_by_row(world, num_processes, num_workers):
    """Files of 1, 16, 2 and 11 rows: each process and worker draws its own rows from all of them, and none twice."""
    rows = [{"instruction": f"question {number}", "output": "a"} for number in range(NUM_ROWS)]
    (world.folder / "shards").mkdir()
    for number, (start, end) in enumerate(pairwise((0, 1, 17, 19, NUM_ROWS))):
        shard = world.folder / "shards" / f"part-{number}.jsonl"
        shard.write_text("\n".join(map(json.dumps, rows[start:end])))
    (world.folder / "dataset_info.json").write_text(json.dumps({"shards": {"file_name": "shards"}}))
    num_shares = num_processes * max(num_workers, 1)
    drawn = []
    for process in range(num_processes):
        stream = world.stream(dataset="shards")
        stream.process, stream.num_processes = process, num_processes
        loader = DataLoader(stream, batch_size=1, num_workers=num_workers, collate_fn=list)
        count = NUM_ROWS // num_processes
        drawn.append(numbers(item.row for batch in islice(loader, count) for item in batch))
    assert NUM_ROWS % num_shares == 0
    assert Counter(number for numbers_of_process in drawn for number in numbers_of_process) == Counter(range(NUM_ROWS))


def test_fewer_rows_than_processes_leave_none_without_rows(world):
    world.write([{"instruction": f"question {number}", "output": "a"} for number in range(2)])
    for process in range(3):
        rows = world.stream()
        rows.process, rows.num_processes = process, 3
        assert set(numbers(take(rows, 12))) == {0, 1}


def test_rows_for_evaluation_come_from_the_front_and_are_never_drawn(world):
    data = world.prepared(val_size=4)
    front = numbers(world.stream().first(4)[0])
    assert numbers(data.eval[""]) == front
    assert Counter(numbers(take(data.train, 2 * (NUM_ROWS - 4)))) == {n: 2 for n in range(NUM_ROWS) if n not in front}
    assert data.ledger.accounts["d"].rows_in == data.ledger.accounts["d"].kept == 4


@pytest.mark.parametrize("count", [NUM_ROWS, NUM_ROWS + 1])
def test_more_rows_for_evaluation_than_there_are(world, count):
    with pytest.raises(DataError, match="val_size"):
        world.prepared(val_size=count)


def test_all_rows_that_can_be_used_are_for_evaluation(world):
    """The error comes before a model is loaded, and does not say of a usable dataset that it is none."""
    world.write([{"instruction": "question 1", "output": "a"}, {"instruction": "no answer"}])
    with pytest.raises(DataError, match="val_size takes all 1 usable rows of the stream and leaves none to train on"):
        world.prepared(val_size=1)


@pytest.mark.parametrize(("val_size", "num_left"), [(4, 0), (3, 1)])
def test_all_rows_of_one_dataset_are_for_evaluation(world, said, val_size, num_left):
    rows = [{"instruction": f"question {NUM_ROWS + number}", "output": "a"} for number in range(4)]
    (world.folder / "small.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"instruction": "no answer"}])))
    info = json.loads((world.folder / "dataset_info.json").read_text())
    (world.folder / "dataset_info.json").write_text(json.dumps({**info, "small": {"file_name": "small.jsonl"}}))
    data = world.prepared(dataset="small,d", val_size=val_size, disable_shuffling=True)
    trained = set(numbers(take(data.train, NUM_ROWS + num_left)))
    assert trained == set(range(NUM_ROWS + 4)) - set(range(NUM_ROWS, NUM_ROWS + val_size))
    warned = [message for message in said if "dataset 'small': val_size takes all its usable rows" in message]
    assert len(warned) == (not num_left)


def test_a_row_in_the_middle_that_cannot_be_used_is_told_and_passed_over(world):
    rows: list[Any] = [{"instruction": f"question {number}", "output": "a"} for number in range(6)]
    world.write([*rows[:3], '{"instruction": 3', *rows[3:], {"instruction": "no answer", "output": 7}])
    found, ledger = world.stream().first(None)
    assert sorted(numbers(found)) == list(range(6))
    account = ledger.accounts["d"]
    assert (account.rows_in, account.kept, account.num_dropped) == (8, 6, 2)
    places = [place for places in account.dropped_rows.values() for place in places]
    assert sorted(places) == [f"{world.source}, row 4", f"{world.source}, row 8"]
    assert any(reason.startswith("not JSON") for reason in account.dropped)


def test_a_stream_of_which_nothing_can_be_used(world):
    world.write([{"instruction": "a question"}] * 3)
    for rows in (iter(world.stream()), DataLoader(world.stream(), collate_fn=list)):
        with pytest.raises(
            DataError, match=r"dataset 'd' has no usable row\n  d: column 'output' is missing \(.*, row \d"
        ):
            next(iter(rows))


def test_an_empty_stream(world):
    world.source.write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        next(iter(world.stream()))
    world.source.write_text("\n\n")
    with pytest.raises(DataError, match="holds no rows"):
        next(iter(world.stream()))


def test_a_file_that_changes_while_it_is_read(world):
    rows = iter(world.stream())
    next(rows)
    with world.source.open("a") as file:
        file.write('\n{"instruction": "question 99", "output": "new"}')
    with pytest.raises(DataError, match=r"d.jsonl has changed since the run began to stream it -> start over"):
        list(islice(rows, 10 * NUM_ROWS + 3000))


def test_a_fault_in_a_worker_arrives_as_a_row(world):
    rows = world.stream()
    world.source.write_text("[{")
    (item,) = next(iter(DataLoader(rows, batch_size=1, num_workers=1, collate_fn=list)))
    assert isinstance(item.fault, DataError) and "has changed" in str(item.fault)


def test_blocks_go_on_from_window_to_window(world):
    """Any window gives the blocks of one text, which is that of the pass after it, too."""
    keys = {"stage": "pt", "dataset": "e", "cutoff_len": 64, "disable_shuffling": True}
    small, large = world.stream(**keys), world.stream(**keys)
    small.window_rows, large.window_rows = 1, 500
    blocks = take(small, 40)
    assert blocks == take(large, 40)
    assert all(len(block["input_ids"]) == 64 and block["labels"] == block["input_ids"] for block in blocks)
    text = "".join(f"a line of text, number {number}</s>" for number in range(NUM_ROWS))
    whole = byte_tokenizer().encode(text, add_special_tokens=False)
    assert [token for block in blocks for token in block["input_ids"]] == (whole * 5)[: 40 * 64]


def test_what_is_not_yet_in_a_block_is_told(world):
    ledger = Ledger()
    for item in islice(world.stream(stage="pt", dataset="e", cutoff_len=64), 40):
        ledger.add(item.account)
    assert ledger.accounts["e"].tokens == 40 * 64 + ledger.leftover_tokens
    assert ledger.samples == {"train": 40}
    assert any("not yet in a block" in line for line in ledger.summary())


@pytest.mark.parametrize("buffer_size", [10, 8])
def test_packs_are_made_of_a_window(world, buffer_size):
    rows, ledger = world.stream(packing=True, cutoff_len=400, buffer_size=buffer_size).first(None)
    assert all(len(row["input_ids"]) == sum(row["sample_lengths"]) <= 400 for row in rows)
    assert sum(len(row["sample_lengths"]) for row in rows) == NUM_ROWS == ledger.accounts["d"].kept
    assert sum(len(row["input_ids"]) for row in rows) == ledger.accounts["d"].tokens
    assert max(len(row["sample_lengths"]) for row in rows) > 1 and ledger.leftover_tokens == 0


def test_what_is_held_does_not_follow_the_dataset(world):
    """Of a hundred thousand rows no more are read than buffer and batches hold."""
    world.write([{"instruction": f"question {number}", "output": "a"} for number in range(20000)])
    rows = world.stream(buffer_size=50, preprocessing_batch_size=20)
    read = []
    opened = rows.stream.open
    rows.stream = replace(rows.stream, open=lambda spec: (read.append(1) or row for row in opened(spec)))
    take(rows, 3)
    assert len(read) < 50 + 5 * 20


def test_workers_that_are_not_forked_get_the_same_rows(world):
    rows = world.stream(packing=True, cutoff_len=400)
    assert take(pickle.loads(pickle.dumps(rows)), 5) == take(rows, 5)


def test_two_datasets_in_turns(world):
    found = texts(take(world.stream(dataset="d,e", stage="pt", packing=False, mix_strategy="interleave_under",
                                    disable_shuffling=True), 6))  # fmt: skip
    assert [text.startswith("question") for text in found] == [True, False] * 3


def test_num_samples_is_not_followed_and_it_is_said(world, said):
    info = json.loads((world.folder / "dataset_info.json").read_text())
    info["d"]["num_samples"] = 2
    (world.folder / "dataset_info.json").write_text(json.dumps(info))
    assert len(world.stream().first(None)[0]) == NUM_ROWS
    assert any("num_samples is ignored while streaming" in message for message in said)


REFUSED = [
    ({"max_steps": -1}, "streaming", "set max_steps"),
    ({"max_samples": 3}, "max_samples", "leave max_samples out"),
    ({"val_size": 0.5}, "val_size", "write a whole number of rows"),
    ({"tokenized_path": "somewhere/new"}, "tokenized_path", "leave streaming out for the run that writes it"),
    ({"buffer_size": 0}, "buffer_size", "must be at least 1"),
    ({"stage": "dpo", "dataset": "pairs"}, "streaming", "pref_loss: orpo or simpo"),
]


@pytest.mark.parametrize(("keys", "key", "text"), REFUSED, ids=[next(iter(keys)) for keys, _, _ in REFUSED])
def test_what_needs_all_rows_is_refused(world, keys, key, text):
    with pytest.raises(ConfigError) as fault:
        world.run(**keys)
    (problem,) = fault.value.problems
    assert problem.key == key and text in f"{problem.reason} {problem.remedy}"


def test_pairs_are_streamed_like_any_rows(world):
    run = world.run(stage="dpo", dataset="pairs", streaming=False, max_steps=-1, buffer_size=16384)
    run = replace(run, data=replace(run.data, streaming=True, buffer_size=4))
    encoding = Encoding(Encoder(byte_tokenizer()), get_template("chatml"), run.data.cutoff_len)
    rows = take(prepare(run, STAGES.get(run.stage).rows, encoding).streamed, 5)
    assert all({"chosen_input_ids", "rejected_input_ids"} <= row.keys() for row in rows)


def test_keys_that_a_stream_does_not_follow_are_warned_of(world):
    folder = Path(world.folder, "rows")
    folder.mkdir()
    (folder / "x").touch()
    (warning,) = world.run(tokenized_path=str(folder)).warnings
    assert warning.key == "streaming" and "tokenized already" in warning.reason
    (warning,) = world.run(streaming=False).warnings
    assert warning.key == "buffer_size" and warning.reason == "is not read here, only by streaming: true"
    (warning,) = world.run(train_sampling_strategy="group_by_length").warnings
    assert warning.key == "train_sampling_strategy"
