"""Images whose bytes stood in rows go with the rows that list them."""

import hashlib
import json
import os
import time

import pytest

from luthier.data.cache import eviction
from luthier.data.cache.eviction import evict
from luthier.data.cache.kept_images import IMAGES_FILE, SPARED_SECONDS, listed_in, remove_unlisted
from luthier.data.cache.store import Cache
from luthier.data.media.items import stored
from luthier.data.media.reader import state_of


@pytest.fixture
def keep(tmp_path, monkeypatch):
    """Makes an entry in `rows/` that lists images of these contents, all of them unused for so long."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))

    def make(key, contents, *, seconds):
        paths = [stored(content) for content in contents]
        entry = Cache(tmp_path / "rows").entry(
            key, lambda folder: (folder / IMAGES_FILE).write_text(json.dumps([*paths, "/elsewhere/a.png"]))
        )
        used = time.time() - seconds
        for path in paths:
            os.utime(path, (used, used))
        os.close(eviction._in_use.pop(entry))  # as if the process that made it had ended
        os.utime(entry / "sizes.json", (used, used))
        return entry

    (tmp_path / "rows").mkdir()
    return make


def left_of(tmp_path, *contents):
    """Those of the images that are there; reading one would count as use."""
    return [content for content in contents if (tmp_path / "media" / hashlib.sha256(content).hexdigest()).exists()]


def test_images_count_with_the_entry_that_lists_them_and_go_with_it(tmp_path, keep):
    a, b, c = (letter * 6000 for letter in (b"a", b"b", b"c"))
    keep("old", [a, b], seconds=2 * SPARED_SECONDS)
    keep("new", [b, c], seconds=SPARED_SECONDS + 60)
    evict(tmp_path / "rows", 30_000)
    assert left_of(tmp_path, a, b, c) == [a, b, c], "all of it fits"
    evict(tmp_path / "rows", 20_000)
    assert [entry.name for entry in (tmp_path / "rows").iterdir() if entry.is_dir()] == ["new"]
    assert left_of(tmp_path, a, b, c) == [b, c]


def test_what_no_entry_lists_stays_for_a_week(tmp_path, keep):
    """A stream has no entry."""
    keep("one", [b"a"], seconds=2 * SPARED_SECONDS)
    used = {b"b": 2 * SPARED_SECONDS, b"c": SPARED_SECONDS - 3600}
    for content, seconds in used.items():
        moment = time.time() - seconds
        os.utime(stored(content), (moment, moment))
    (tmp_path / "media" / "sizes.jsonl").write_text("x")
    assert remove_unlisted(tmp_path / "media", [tmp_path / "rows" / "one"]) == 1
    assert left_of(tmp_path, b"a", b"b", b"c") == [b"a", b"c"]
    assert (tmp_path / "media" / "sizes.jsonl").exists()


def test_an_image_that_is_used_again_is_not_a_changed_one(tmp_path, keep):
    entry = keep("one", [b"a"], seconds=2 * SPARED_SECONDS)
    (name,) = listed_in(entry, tmp_path / "media")
    before = state_of(str(tmp_path / "media" / name))
    stored(b"a")
    assert state_of(str(tmp_path / "media" / name)) == before
    assert remove_unlisted(tmp_path / "media", []) == 0, "it was used just now"


def test_without_images(tmp_path):
    assert remove_unlisted(tmp_path / "media", []) == 0
    assert listed_in(tmp_path, tmp_path) == set()
