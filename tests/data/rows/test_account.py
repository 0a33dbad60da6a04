"""The account of a dataset: counts add up, and every reason names its first rows."""

from dataclasses import asdict

from luthier.core.errors import RowError
from luthier.data.media.kinds import media_kinds
from luthier.data.rows.account import MAX_LISTED_ROWS, MAX_QUOTED_CHARS, DatasetAccount
from luthier.data.rows.labels import Encoded


def account_of(file: str, num_rows: int, **counts: int) -> DatasetAccount:
    account = DatasetAccount(**counts)
    for number in range(num_rows):
        account.drop(f"{file}, row {number}", RowError("bad"))
    return account


def test_dropped_rows_are_all_counted_and_the_first_are_named():
    account = account_of("f", MAX_LISTED_ROWS + 5)
    account.drop("f, row 99", RowError("worse"))
    assert account.dropped == {"bad": MAX_LISTED_ROWS + 5, "worse": 1} and account.num_dropped == MAX_LISTED_ROWS + 6
    assert account.dropped_rows["bad"] == [f"f, row {number}" for number in range(MAX_LISTED_ROWS)]


def test_accounts_add_up():
    first, second = account_of("f", 2, rows_in=3, kept=1, tokens=9), account_of("g", 25, rows_in=26, kept=1, tokens=4)
    first.add(second)
    assert (first.rows_in, first.kept, first.tokens, first.num_dropped) == (29, 2, 13, 27)
    assert first.dropped_rows["bad"][:3] == ["f, row 0", "f, row 1", "g, row 0"]
    assert len(first.dropped_rows["bad"]) == MAX_LISTED_ROWS


def test_what_is_taken_is_no_longer_counted():
    account = account_of("f", 2, rows_in=3, kept=1)
    taken = account.taken()
    assert taken == account_of("f", 2, rows_in=3, kept=1)
    assert account == DatasetAccount()


def test_data_quoted_in_a_reason_do_not_split_it():
    account = DatasetAccount()
    for number in range(2000):
        account.drop(f"f, row {number}", RowError(f"message {number} calls {number!r}, not a tool", repr(number)))
    assert account.dropped == {"message … calls …, not a tool": 2000}
    (rows,) = account.dropped_rows.values()
    assert rows[:2] == ["f, row 0: 0", "f, row 1: 1"] and len(rows) == MAX_LISTED_ROWS


def test_long_data_are_cut():
    account = DatasetAccount()
    account.drop("f, row 1", RowError("bad: " + "x" * 500, "x" * 500))
    assert account.dropped_rows == {"bad: …": ["f, row 1: " + "x" * MAX_QUOTED_CHARS]}


def test_other_words_are_other_reasons():
    account = DatasetAccount()
    account.drop("f, row 1", RowError("column 'a' is missing"))
    account.drop("f, row 2", RowError("column 'b' is missing"))
    assert account.dropped == {"column 'a' is missing": 1, "column 'b' is missing": 1}


def test_nothing_is_counted_at_first_and_every_count_adds_up():
    assert not any(asdict(DatasetAccount()).values())
    counts = [name for name, value in asdict(DatasetAccount()).items() if value == 0]
    first, second = (DatasetAccount(**dict.fromkeys(counts, number)) for number in (2, 3))
    first.add(second)
    assert asdict(first) == {**asdict(DatasetAccount()), **dict.fromkeys(counts, 5)}
    assert asdict(first.taken()) == {**asdict(DatasetAccount()), **dict.fromkeys(counts, 5)}
    assert not any(asdict(first).values())


def test_media_are_counted_once_and_their_tokens_in_every_part():
    """The first image stands in both parts, the video in one of them, and truncation left the last image out."""
    account = DatasetAccount()
    parts = [
        Encoded([0] * 9, [0] * 9, blocks=[1, 4, 5, 7], items=[0, 1]),
        Encoded([0] * 9, [0] * 9, blocks=[2, 5], items=[0]),
    ]
    account.count_media(["/a.png", "video:/b.mp4", "/c.png"], parts, num_cut=1)
    found = {kind.name: account.of_kind(kind) for kind in media_kinds()}
    assert found == {"image": (1, 6, 1), "video": (1, 2, 0), "audio": (0, 0, 0)} and account.media_cut == 1
