"""Only what is below the root is shown."""

from luthier.webui.board import MAX_CURVES, Board


def test_an_address_leads_nowhere_outside(tmp_path):
    root = tmp_path / "root"
    (root / "saves" / "one").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path)
    board = Board(root)
    assert board.folder_of("saves/one") == root / "saves" / "one"
    assert board.name_of(root / "saves" / "one") == "saves/one"
    for name in ("", ".", "..", "saves/../..", "../root2", str(tmp_path), "link/x"):
        assert board.folder_of(name) is None, name


def test_what_has_been_read_is_shared_and_bounded(tmp_path):
    board = Board(tmp_path)
    first = board.curves(tmp_path / "one")
    assert board.curves(tmp_path / "one") is first
    for number in range(MAX_CURVES):
        board.curves(tmp_path / str(number))
    assert board.curves(tmp_path / "one") is not first
