"""Where the board listens: words, then the variables of the reference, then the defaults."""

import pytest

from luthier.core.errors import InvalidInput, OutputError
from luthier.webui.options import from_words, unread_variables

VARIABLES = {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": "8000"}


@pytest.mark.parametrize(
    ("words", "variables", "host", "port"),
    [
        ([], {}, "127.0.0.1", 7860),
        ([], VARIABLES, "0.0.0.0", 8000),
        ([], {"GRADIO_SERVER_NAME": " ", "GRADIO_SERVER_PORT": ""}, "127.0.0.1", 7860),
        (["--host", "::1", "--port=0"], VARIABLES, "::1", 0),
    ],
)
def test_host_and_port(words, variables, host, port, tmp_path):
    options = from_words([*words, "--root", str(tmp_path)], variables)
    assert (options.host, options.port, options.root) == (host, port, tmp_path)
    assert options.is_local == (host != "0.0.0.0")


@pytest.mark.parametrize("words", [["--port", "many"], ["--port", "70000"], ["--prot", "1"], ["run.yaml"], ["--root"]])
def test_what_is_wrong_is_named(words):
    with pytest.raises(InvalidInput, match="webui"):
        from_words(words, {})


def test_what_the_board_does_not_have_is_said():
    assert [*unread_variables({"GRADIO_SHARE": "0", "GRADIO_IPV6": "", **VARIABLES})] == []
    lines = [*unread_variables({"GRADIO_SHARE": "1", "GRADIO_IPV6": "true", "GRADIO_ROOT_PATH": "/board"})]
    assert [line.partition(" is not read -> ")[0] for line in lines] == [
        "GRADIO_IPV6",
        "GRADIO_SHARE",
        "GRADIO_ROOT_PATH",
    ]


def test_a_root_that_is_no_folder(tmp_path):
    with pytest.raises(OutputError, match="is not a folder"):
        from_words(["--root", str(tmp_path / "absent")], {})
