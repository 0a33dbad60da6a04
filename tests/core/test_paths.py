"""Paths that were written on Windows."""

from luthier.core.paths import absent_remedy, windows_remedy


def test_a_path_of_windows_is_written_for_this_system():
    assert absent_remedy("data\\sub\\d.json", "look again") == (
        "write it as data/sub/d.json: a backslash separates folders on Windows only"
    )
    assert absent_remedy("data/d.json", "look again") == "look again"


def test_on_windows_it_is_a_path_like_any_other(monkeypatch):
    monkeypatch.setattr("os.sep", "\\")
    assert absent_remedy("data\\d.json", "look again") == "look again"


def test_a_name_with_a_backslash_is_what_it_is(tmp_path):
    path = str(tmp_path / "a\\b")
    assert windows_remedy(path).startswith(f"write it as {tmp_path}/a/b")
    (tmp_path / "a\\b").write_text("")
    assert windows_remedy(path) == windows_remedy(str(tmp_path)) == ""
