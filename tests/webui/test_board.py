"""Only what is below the root is shown."""

import asyncio
from types import SimpleNamespace

import pytest

from luthier.core.errors import RunFailed
from luthier.webui.board import MAX_CURVES, Board
from luthier.webui.chat_models import ChatModel


def test_an_address_leads_nowhere_outside(tmp_path):
    root = tmp_path / "root"
    (root / "saves" / "one").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path)
    board = Board(root)
    assert board.folder_of("saves/one") == root / "saves" / "one"
    assert board.name_of(root / "saves" / "one") == "saves/one"
    for name in ("", ".", "..", "saves/../..", "../root2", str(tmp_path), "link/x"):
        assert board.folder_of(name) is None, name


def test_an_address_that_no_folder_can_have_leads_nowhere(tmp_path):
    board = Board(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for name in ("a\0b", "a" * 300, "a/" * 3000):
        assert board.folder_of(name) is None, name
    for name in ("absent", "loop"):  # a page says that there is no run
        assert board.folder_of(name) == tmp_path / name


def test_what_has_been_read_is_shared_and_bounded(tmp_path):
    board = Board(tmp_path)
    first = board.curves(tmp_path / "one")
    assert board.curves(tmp_path / "one") is first
    for number in range(MAX_CURVES):
        board.curves(tmp_path / str(number))
    assert board.curves(tmp_path / "one") is not first


def test_pages_that_ask_for_a_model_at_the_same_time_get_one_process(tmp_path):
    board, started = Board(tmp_path), []

    async def start(model):
        started.append(model.name)
        await asyncio.sleep(0.01)
        return SimpleNamespace(is_alive=True)

    async def ask():
        asked = (board.loaded(ChatModel(name, "", ()), start) for name in ("one", "two", "one"))
        first, second, third = await asyncio.gather(*asked)
        assert first is third is not second and started == ["one", "two"]
        first.is_alive = False  # it has died
        assert await board.loaded(ChatModel("one", "", ()), start) is not first

    asyncio.run(ask())


def test_a_model_that_does_not_start_can_be_asked_for_again(tmp_path):
    board, model = Board(tmp_path), ChatModel("one", "", ())

    async def fail(model):
        raise RunFailed("no memory")

    async def start(model):
        return SimpleNamespace(is_alive=True)

    async def ask():
        with pytest.raises(RunFailed, match="no memory"):
            await board.loaded(model, fail)
        assert (await board.loaded(model, start)).is_alive

    asyncio.run(ask())
