"""Images as a kind of media."""

import pytest

from luthier.core.errors import RowError
from luthier.data.media.kinds import Loaded, arguments_for, examined, media_kind
from tests.media_models import draw

IMAGE = media_kind("image")


def test_an_image_is_measured_and_handed_over_in_rows(tmp_path):
    path = str(draw(tmp_path / "a.png", height=20, width=30))
    shape = examined(path, None).shape
    assert shape == ("image", (20, 30)) and IMAGE.shown(shape.size) == "20x30"
    assert (IMAGE.blank(shape.size, None).size, IMAGE.noise(shape.size, None).size) == ((30, 20), (30, 20))
    loaded = Loaded("image", IMAGE.loaded(path, None))
    given = arguments_for([[loaded], [], [loaded, loaded]], None)
    assert [len(images) for images in given["images"]] == [1, 0, 2]
    assert IMAGE.of_loaded(loaded.content) == "20x30 pixels" and IMAGE.former(path) == (20, 30)


def test_what_is_no_path():
    with pytest.raises(RowError, match="item 1 is not image data in base64"):
        IMAGE.path_of("data:image/png;base64,@", "item 1")
