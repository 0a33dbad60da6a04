"""`luthier env`"""

import shutil
import subprocess
from pathlib import Path

import pytest

import luthier
from luthier import cli
from luthier.run.env import _commit


def test_env_lists_versions(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"- luthier: {luthier.__version__}" in out and "- transformers: " in out and "- python: " in out


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_checkout(tmp_path, capsys):
    def git(*words):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", *settings, "-C", str(tmp_path), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    package, installed = tmp_path / "luthier", tmp_path / "site-packages" / "luthier"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("", encoding="utf-8")
    assert _commit(package) is None
    git("init", "-q")
    git("add", "luthier")
    git("commit", "-qm", "first")
    assert _commit(package) == git("rev-parse", "HEAD")
    assert _commit(installed) is None, "the checkout is of something else"
    (package / "__init__.py").write_text("1", encoding="utf-8")
    assert _commit(package) == git("rev-parse", "HEAD") + " with changes"
    found, here = _commit(Path(luthier.__file__).parent), cli.main(["env"])
    assert here == 0 and (f"- git commit: {found}" in capsys.readouterr().out) == (found is not None)
