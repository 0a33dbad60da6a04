"""`luthier webchat RUN`: the chat with one model in a browser. It is loaded with the first message."""

import os
from pathlib import Path

from luthier.core.errors import InvalidInput
from luthier.run.webui import require_libraries, serve_board


def main(argv: list[str]) -> int:
    """Serve until a signal comes. Raises `LuthierError` for a run file or an address that cannot be used."""
    from luthier.config.load import read_source
    from luthier.config.runs import InferRun
    from luthier.webui.chat_models import ChatModel
    from luthier.webui.options import from_words
    from luthier.workflow.preflight import load_checked, tell_warnings

    if not argv:
        raise InvalidInput("webchat: which run file? e.g. `luthier webchat examples/chat_lora.yaml`")
    options = from_words([], os.environ)
    require_libraries("webchat")
    run = load_checked("infer", read_source(argv), begins=True)
    assert isinstance(run, InferRun)
    tell_warnings(run)
    adapters = ", ".join(run.model.adapter_name_or_path)
    about = run.model.model_name_or_path + (f" + {adapters}" if adapters else "")
    name = Path(adapters or run.model.model_name_or_path).name
    return serve_board(options, ChatModel(name, about, tuple(argv)))
