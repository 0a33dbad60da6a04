"""Models that see, one of each family whose processor loads here, with the text side of a run on them."""

import pytest

from tests.data.media.rows import World, world
from tests.media_models import FAMILIES


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """(family, chat format) -> its world; each is made once."""
    root, made = tmp_path_factory.mktemp("see"), {}

    def get(family: str, template: str = "auto") -> World:
        if (family, template) not in made:
            made[family, template] = world(root / family, FAMILIES[family], template)
        return made[family, template]

    return get
