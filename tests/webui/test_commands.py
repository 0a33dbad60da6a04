"""What the commands say about a text, or what they say against it."""

import asyncio

import pytest
import yaml

from luthier.core.errors import RunFailed
from luthier.webui.commands import doctor_of, plan_of, rows_of
from tests.small_world import small_world


@pytest.mark.thorough
def test_a_plan_is_that_of_the_command(tmp_path):
    plan = asyncio.run(plan_of(yaml.safe_dump(small_world(tmp_path))))
    assert "peak" in plan and "6 steps" in plan


def test_a_plan_that_cannot_be_made_says_why():
    with pytest.raises(RunFailed, match=r"run.yaml:1: learning_rat: 1: unknown key"):
        asyncio.run(plan_of("learning_rat: 1\n"))


@pytest.mark.thorough
def test_rows_and_the_doctor_are_those_of_the_command(tmp_path):
    text = yaml.safe_dump(small_world(tmp_path))
    page = asyncio.run(rows_of(text, 3))
    assert "<html" in page and "train row 2" in page and "train row 3" not in page
    assert "numbers" in asyncio.run(doctor_of(text))
