"""The tags of all training rows together, such as how many answers are liked and how many disliked (kto)."""

from collections import Counter
from typing import TYPE_CHECKING

from luthier.core.log import warn
from luthier.data.rows.arrow import batches_of
from luthier.data.rows.table import Table

if TYPE_CHECKING:
    from luthier.data.rows.row_plan import RowPlan


def warn_of_tags(plan: "RowPlan", rows: Table | None) -> None:
    """Warn of tags that the plan finds one-sided. `rows`: None if they are streamed, and not known before training."""
    if rows is None or plan.one_sided is None:
        return
    counts = {
        name: Counter(int(value) for values, _ in batches_of(rows, name) for value in values) for name in plan.tags
    }
    found = plan.one_sided(counts)
    if found is not None:
        warn(" -> ".join(found))
