"""`luthier verify DIR` says what it found and gives the exit status that a script needs."""

import pytest

from luthier.core.errors import OutputError
from luthier.core.manifest import write_manifest
from luthier.run.verify import main


def test_a_whole_folder(tmp_path, capsys):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"67")
    write_manifest(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: OK, 2 files, 7 bytes\n"


def test_a_damaged_folder_names_each_file(tmp_path, capsys):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"67")
    write_manifest(tmp_path)
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "b").unlink()
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "a: truncated, 3 of 5 bytes",
        "b: missing",
        f"{tmp_path}: 2 of 2 files are not as recorded",
    ]


def test_what_cannot_be_verified_exits_2(tmp_path):
    with pytest.raises(OutputError) as error:
        main([str(tmp_path)])
    assert error.value.exit_status == 2


def test_the_files_of_a_folder_are_recorded_once(tmp_path, capsys):
    (tmp_path / "a").write_bytes(b"12345")
    assert main(["--record", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: OK, 1 files, 5 bytes\n"
    (tmp_path / "a").write_bytes(b"54321")
    with pytest.raises(OutputError, match="json already -> remove it"):
        main(["--record", str(tmp_path)])
    assert main([str(tmp_path)]) == 1
    with pytest.raises(OutputError, match="no such folder"):
        main(["--record", str(tmp_path / "nowhere")])
