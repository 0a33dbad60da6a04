"""What holds for all kinds of media: items name their kind, tags can be renamed."""

import pytest

from luthier.core.kinds import MEDIA_KINDS
from luthier.data.media.kinds import by_column, by_kind, files_of, kind_of, media_kind, media_kinds, path_in, states_of
from luthier.data.types import PLACES

IMAGE = media_kind("image")


def test_items_name_their_kind_and_images_are_paths():
    items = [kind.item(f"/{kind.name}.x") for kind in media_kinds()]
    assert items[0] == "/image.x" and len(set(items)) == len(MEDIA_KINDS.names) == 3
    assert [kind_of(item) for item in items] == list(media_kinds())
    assert [path_in(item) for item in items] == [f"/{kind.name}.x" for kind in media_kinds()]
    assert by_column([*items, *items[:1]]) == {
        "images": ["/image.x"] * 2,
        "audios": ["/audio.x"],
        "videos": ["/video.x"],
    }
    assert [kind.name for kind in by_kind(items[1:])] == [kind.name for kind in media_kinds()[1:]]
    assert {kind.place for kind in media_kinds()} == set(PLACES)
    assert (
        kind_of("C:/a.png") is IMAGE and files_of("audio:/a.wav") == ("/a.wav",) and states_of("/absent.png") == [None]
    )


@pytest.mark.parametrize(("count", "words"), [(0, "no audio files"), (1, "1 audio file"), (2, "2 audio files")])
def test_numbers_of_items_in_words(count, words):
    assert media_kind("audio").named(count) == words


def test_tags_can_be_renamed(monkeypatch):
    assert [kind.written_tag for kind in media_kinds()] == [f"<{kind.name}>" for kind in media_kinds()]
    monkeypatch.setenv("AUDIO_PLACEHOLDER", "[sound]")
    assert media_kind("audio").written_tag == "[sound]" and IMAGE.written_tag == "<image>"
