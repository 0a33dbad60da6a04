"""Matrices of tests: `make test` runs their representatives, `make test-all` the rest, pytest by itself all of them."""

from collections.abc import Iterable
from typing import Any

import pytest


def representatives(members: Iterable[Any], *kept: Any) -> list[Any]:
    """All members as parameters; all but `kept` carry the marker `thorough`, which `make test` leaves out.

    @pytest.mark.parametrize("stage", representatives(STAGES, "sft", "dpo"))
    """
    members = list(members)
    assert kept and all(member in members for member in kept), f"{kept} are not all among {members}"
    return [member if member in kept else _thorough(member) for member in members]


def _thorough(member: Any) -> Any:
    values = member if isinstance(member, tuple) else (member,)
    return pytest.param(*values, marks=pytest.mark.thorough)
