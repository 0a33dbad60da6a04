"""The account of a dataset: counts add up, and every reason names its first rows."""

from luthier.data.rows.account import MAX_LISTED_ROWS, DatasetAccount


def account_of(file: str, num_rows: int, **counts: int) -> DatasetAccount:
    account = DatasetAccount(**counts)
    for number in range(num_rows):
        account.drop(f"{file}, row {number}", "bad")
    return account


def test_dropped_rows_are_all_counted_and_the_first_are_named():
    account = account_of("f", MAX_LISTED_ROWS + 5)
    account.drop("f, row 99", "worse")
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
