from luthier.core.paths import absent_remedy


def test_a_path_of_windows_is_written_for_this_system():
    assert absent_remedy("data\\sub\\d.json", "look again") == (
        "write it as data/sub/d.json: a backslash separates folders on Windows only"
    )
    assert absent_remedy("data/d.json", "look again") == "look again"


def test_on_windows_it_is_a_path_like_any_other(monkeypatch):
    monkeypatch.setattr("os.sep", "\\")
    assert absent_remedy("data\\d.json", "look again") == "look again"
