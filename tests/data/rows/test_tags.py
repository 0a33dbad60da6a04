"""Tags of all rows together. Through whole preparations: tests/data/test_prepare.py."""

from dataclasses import replace

import pytest

from luthier.data.plans.feedback import FEEDBACK
from luthier.data.rows.table import Table
from luthier.data.rows.tags import warn_of_tags


def table(*tags: int) -> Table:
    import pyarrow as pa

    return Table(pa.table({"kto_tags": pa.array([[tag] for tag in tags], pa.list_(pa.int32()))}))


@pytest.mark.parametrize(
    ("rows", "told"),
    [(table(1, 1, 1), "3 training rows are liked and 0 disliked"), (table(0, 1), None), (table(), None), (None, None)],
)
def test_rows_of_one_kind_are_told(said, rows, told):
    warn_of_tags(FEEDBACK, rows)
    assert [told in message for message in said] == [True] * bool(told)


def test_a_plan_without_such_a_rule_tells_nothing(said):
    warn_of_tags(replace(FEEDBACK, one_sided=None), table(1))
    assert said == []
