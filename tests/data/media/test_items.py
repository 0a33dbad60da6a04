"""Which file each image is, where it stands, and which rows cannot be used: each with its reason, and nothing lost."""

import base64
import errno
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from luthier.core.errors import MediaFault, RowError
from luthier.data.media.items import item_in, media_path, path_of, require_usable, stored
from luthier.data.media.kinds import media_kinds
from luthier.data.rows.maker import Drawn
from luthier.data.sources.dataset_info import Columns, DatasetSpec, Source
from luthier.data.sources.readers import Row
from luthier.data.types import Media
from tests.data.media.rows import TAG, answer, row, user

COLUMNS = Columns(images="pictures", videos="videos", audios="sounds")


@pytest.fixture
def spec(tmp_path) -> DatasetSpec:
    (tmp_path / "a.png").touch()
    return DatasetSpec(name="d", source=Source("file", "d.json"), columns=COLUMNS, media_dir=str(tmp_path))


def of_kind(column: str, spec: DatasetSpec, *names: str) -> Media:
    (kind,) = (kind for kind in media_kinds() if kind.column == column)
    return Media(tuple(item_in(name, kind, spec) for name in names))


def test_an_example_without_media_can_be_used(spec):
    require_usable(Media(), spec)


@pytest.mark.parametrize(("kind", "column"), [("images", "pictures"), ("videos", "videos"), ("audios", "sounds")])
def test_a_missing_file_is_named_with_its_column(spec, kind, column):
    with pytest.raises(MediaFault, match=rf"column '{column}' names '.*/no', which is not a file \(media_dir is /"):
        require_usable(of_kind(kind, spec, "a.png", "no"), spec)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("images", "the row has images, and the model reads text only"),
        ("videos", "the row has videos, and the model reads text only"),
        ("audios", "the row has audio, and the model reads text only"),
    ],
)
def test_media_that_are_there_are_refused_as_such(spec, kind, reason):
    with pytest.raises(RowError, match=reason) as found:
        require_usable(of_kind(kind, spec, "a.png"), spec)
    assert not isinstance(found.value, MediaFault)
    require_usable(of_kind(kind, spec, "a.png"), spec, takes=("image", "video", "audio"))
    if kind != "images":
        with pytest.raises(RowError, match="and the model reads text and images only"):
            require_usable(of_kind(kind, spec, "a.png"), spec, takes=("image",))


def test_an_address_is_no_file(spec):
    with pytest.raises(MediaFault, match=r"'https://example\.org/b\.png': images are read from files only"):
        require_usable(Media(("https://example.org/b.png",)), spec, takes=("image",))


def test_only_relative_paths_of_local_data_start_from_media_dir(spec, tmp_path):
    assert media_path("a.png", spec) == str(tmp_path / "a.png")
    assert media_path(str(tmp_path / "b.png"), spec) == str(tmp_path / "b.png")
    assert media_path("https://example.org/b.png", spec) == "https://example.org/b.png"
    assert media_path("a.png", replace(spec, source=Source("hf_hub", "o/r"))) == "a.png"


class TestPath:
    def test_bytes_are_written_once(self, tmp_path):
        content = b"some bytes"
        path = path_of({"bytes": content, "path": "other.png"}, "item 1")
        assert path == path_of(content, "item 1") == stored(content)
        assert Path(path).read_bytes() == content
        address = "data:image/png;base64," + base64.b64encode(content).decode()
        assert path_of(address, "item 1") == path

    def test_a_file_of_another_user_of_the_cache_is_used(self, monkeypatch):
        def refuse(path, *, ns):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)

        path = stored(b"of another user")
        monkeypatch.setattr(os, "utime", refuse)
        assert stored(b"of another user") == path

    @pytest.mark.parametrize("item", ["a.png", {"path": "a.png"}, {"bytes": None, "path": "a.png"}])
    def test_paths(self, item):
        assert path_of(item, "item 1") == "a.png"

    @pytest.mark.parametrize(
        ("item", "reason"),
        [
            (None, "item 1 is null, not a path"),
            (5, "item 1 is of type int, not a path"),
            ("", "item 1 is empty, not a path"),
            ({}, "item 1 is an object without 'bytes' and 'path'"),
            ("data:image/png,abc", "item 1 is not image data in base64: it does not begin with data:TYPE;base64,"),
            ("data:image/png;base64,***", "item 1 is not image data in base64: "),
        ],
    )
    def test_others(self, item, reason):
        with pytest.raises(RowError) as caught:
            path_of(item, "item 1")
        assert str(caught.value).startswith(reason)


class TestRows:
    """Rows that cannot be used are dropped with a reason that names the file, and the others train."""

    @pytest.fixture(scope="class")
    def see(self, worlds):
        see = worlds("paddleocr_vl")
        folder = see.folder
        (folder / "dir.png").mkdir(exist_ok=True)  # the world is shared, and this fixture may run again
        (folder / "empty.png").touch()
        (folder / "text.png").write_text("hello")
        picture = (folder / see.image(120, 120)).read_bytes()
        (folder / "cut.png").write_bytes(picture[: len(picture) // 2])
        (folder / "bomb.png").write_bytes(_png(30000, 30000))
        see.image(10, 2001)
        return see

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("missing.png", "column 'images' names '{path}', which is not a file (media_dir is {folder})"),
            ("dir.png", "column 'images' names '{path}', which is a folder, not a file (media_dir is {folder})"),
            ("empty.png", "'{path}' is an empty file, not an image"),
            ("text.png", "'{path}' is not an image of a known kind"),
            ("cut.png", "'{path}' cannot be read as an image: "),
            ("bomb.png", "'{path}' has too many pixels to be decoded: Image size (900000000 pixels) exceeds limit"),
            (
                "10x2001-0.png",
                "'{path}': PaddleOCRVLProcessor refuses an image of 10x2001 pixels: absolute aspect"
                " ratio must be smaller than 200",
            ),
            ("https://example.org/a.png", "column 'images' names '{name}': images are read from files only"),
        ],
    )
    def test_files(self, see, name, reason):
        path = see.folder / name
        self.refused(see, f"{TAG}x", [name], reason.format(path=path, folder=see.folder, name=name))

    @pytest.mark.parametrize(
        ("content", "images", "reason"),
        [
            (TAG * 2, ["28x28-0.png"], "the text has 2 <image> tags, and column 'images' has 1 image"),
            (TAG, ["28x28-0.png"] * 2, "the text has 1 <image> tag, and column 'images' has 2 images"),
            ("x", ["28x28-0.png"], "the text has no <image> tags, and column 'images' has 1 image"),
            (TAG, [], "the text has 1 <image> tag, and column 'images' has no images"),
            (TAG, None, "the text has 1 <image> tag, and column 'images' has no images"),
            (TAG, 5, "column 'images' is a number, not a list of paths"),
            (TAG, [None], "item 1 of column 'images' is null, not a path"),
            (TAG, [{}], "item 1 of column 'images' is an object without 'bytes' and 'path'"),
            (TAG, ["data:image/png;base64,***"], "item 1 of column 'images' is not image data in base64: "),
            (f"{TAG}<|IMAGE_PLACEHOLDER|>", ["28x28-0.png"], "the text holds <|IMAGE_PLACEHOLDER|>, which the model"),
            (f"\ufdd0{TAG}", ["28x28-0.png"], "the text holds a character that Unicode keeps for programs"),
        ],
    )
    def test_tags(self, see, content, images, reason):
        self.refused(see, content, images, reason)

    def refused(self, see, content, images, reason):
        see.image(28, 28)
        good = row(user(f"{TAG}x"), answer("y"), images=["28x28-0.png"])
        bad = {**good, "messages": [user(content), answer("y")], "images": images}
        made, account, maker = see.made([good, bad, good])
        assert len(made) == account.kept == 2
        assert account.rows_in == 3
        ((_, [place]),) = account.dropped_rows.items()
        assert place.partition(":")[0] == "see.json, row 2"
        refusals = [item.refusal for item in maker.labeled([Drawn(Row("see.json", 2, bad), see.spec, account)])]
        assert [str(refusal).startswith(reason) for refusal in refusals] == [True], refusals


def _png(width: int, height: int) -> bytes:
    """The header of an image of this size, without its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


class TestPlaces:
    def test_parts_with_their_own_image_stand_among_tags(self, worlds):
        see = worlds("paddleocr_vl")
        first, second, third = (see.image(28, 28 * n) for n in (1, 2, 3))
        content = (see.folder / second).read_bytes()
        parts = [
            {"type": "image", "image": first},
            {"type": "text", "text": "and"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(content).decode()}"}},
            {"type": "image"},
        ]
        made, account, _ = see.made([row(user(parts), answer("x"), images=[third])])
        assert account.kept == 1, account.dropped
        [(example, [(part,)])] = made
        assert example.media.items == (str(see.folder / first), stored(content), str(see.folder / third))
        assert [stop - start for start, stop in zip(part.blocks[::2], part.blocks[1::2], strict=True)] == [3, 4, 5]

    def test_rows_without_an_image_and_data_without_a_column(self, worlds):
        """A dataset that declares no images keeps a tag as words."""
        see = worlds("paddleocr_vl")
        made, _, maker = see.made([row(user("plain"), answer("x"))])
        [(example, [(part,)])] = made
        assert part.blocks == [] and maker.values(example, (part,))[-2:] == ([], [])
        undeclared = replace(see.spec, columns=replace(see.spec.columns, images=None))
        [(_, [(part,)])], _, _ = see.made([row(user(f"{TAG} is a tag"), answer("x"))], spec=undeclared)
        assert "<image> is a tag" in see.text.tokenizer.decode(part.input_ids)
        _, account, _ = worlds("llava").made([row(user(f"{TAG} is a tag"), answer("x"))], spec=undeclared)
        assert list(account.dropped) == [
            "the text holds <image>, which the model takes for an image -> name its column of images in the"
            " description of the data"
        ]

    def test_one_path_as_text(self, worlds):
        see = worlds("paddleocr_vl")
        _, account, _ = see.made([{**row(user(TAG), answer("x")), "images": see.image(28, 28)}])
        assert account.kept == 1

    def test_the_name_of_the_tag_is_that_of_the_environment(self, worlds, monkeypatch):
        see = worlds("paddleocr_vl")
        monkeypatch.setenv("IMAGE_PLACEHOLDER", "[img]")
        _, account, _ = see.made([row(user("[img]"), answer("x"), images=[see.image(28, 28)])])
        assert account.images == 1

    def test_an_answer_that_is_compared_has_no_image(self, worlds):
        see = worlds("paddleocr_vl")
        ranking = replace(see.spec, ranking=True)
        good = {"messages": [user(f"{TAG}what")], "images": [see.image(28, 28)],
                "chosen": answer("a"), "rejected": answer("b")}  # fmt: skip
        bad = {**good, "messages": [user("what")], "chosen": answer(f"a{TAG}")}
        made, account, maker = see.made([good, bad], stage="rm", spec=ranking)
        assert list(account.dropped) == [
            "an image stands in an answer that is compared with another one, and only the other messages can have one"
        ]
        [(example, [parts])] = made
        *_, chosen_blocks, rejected_blocks, images = maker.values(example, parts)
        assert chosen_blocks == rejected_blocks == [6, 9]
        assert images == [str(see.folder / see.image(28, 28))]
