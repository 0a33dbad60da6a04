"""Names that may be meant: the laws of `nearest`, on all names that users write."""

import pytest

from luthier.config.key_table import catalog
from luthier.core.kinds import ADAPTERS, FORMATS, OPTIMIZERS, QUANTIZERS, STAGES
from luthier.core.registry import did_you_mean, nearest
from luthier.data.templates import template_names
from tests.matrix import representatives

KEYS = tuple(catalog())
NAMES = {
    "keys": KEYS,
    "templates": template_names(),
    **{registry.key: registry.names for registry in (STAGES, ADAPTERS, FORMATS, OPTIMIZERS, QUANTIZERS)},
}


@pytest.mark.parametrize("kind", representatives(NAMES, *(kind for kind in NAMES if kind != "keys")))
def test_two_swapped_letters_are_seen_through(kind):
    """Every name with two neighbours swapped, one place for each name, offers that name."""
    known = NAMES[kind]
    for number, name in enumerate(known):
        place = number % max(len(name) - 1, 1)
        swapped = name[:place] + name[place : place + 2][::-1] + name[place + 2 :]
        if swapped not in known:
            assert name in nearest(swapped, known), swapped


@pytest.mark.parametrize("kind", NAMES)
def test_a_name_is_nearest_to_itself(kind):
    for name in NAMES[kind][::7]:
        assert nearest(name.upper(), NAMES[kind])[0] == name


def test_the_best_comes_first():
    assert nearest("chatlm", template_names()) == ("chatml", "chatglm3")
    assert nearest("abcdef", ("abdcefg", "abcxyf", "abcdf")) == ("abcdf", "abdcefg")  # 1 - 1/11, 1 - 2/13
    assert len(nearest("warm", [f"warm{letter}" for letter in "abcdef"])) == 3


def test_what_is_much_farther_than_the_best_is_not_offered():
    assert nearest("learning_rat", KEYS) == ("learning_rate",)
    assert nearest("abcdefgh", ("abcdefg", "abcde")) == ("abcdefg",)


@pytest.mark.parametrize("name", ["", "zzz", "xqj", "qqqqqqqqqqqq"])
def test_far_fetched_names_are_not_offered(name):
    assert nearest(name, KEYS) == () and did_you_mean(name, KEYS) == ""


def test_the_words():
    assert did_you_mean("sftt", ("sft", "dpo")) == "did you mean sft?"
    assert did_you_mean("warmup", ("warmup_steps", "warmup_ratio")) == "did you mean warmup_ratio or warmup_steps?"
    three = ("cat", "bat", "hat")
    assert did_you_mean("at", three, repr) == "did you mean 'bat', 'cat' or 'hat'?"
