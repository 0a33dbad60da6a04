"""`luthier schema`"""

import json

from luthier import cli


def test_schema_is_json(capsys):
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["stage"]
    assert cli.main(["schema", "more"]) == 2
