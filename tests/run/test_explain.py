"""`luthier explain KEY`"""

from luthier import cli


def test_explain(capsys):
    assert cli.main(["explain", "lora_rank"]) == 0
    assert "Rank r" in capsys.readouterr().out
    assert cli.main(["explain", "lora_rnk"]) == 2
    assert capsys.readouterr().err == "luthier: lora_rnk: unknown key; did you mean lora_rank?\n"
    assert cli.main(["explain"]) == 2
