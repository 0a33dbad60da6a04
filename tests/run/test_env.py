"""`luthier env`"""

import luthier
from luthier import cli


def test_env_lists_versions(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"- luthier: {luthier.__version__}" in out and "- transformers: " in out and "- python: " in out
