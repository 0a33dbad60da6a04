"""`luthier api RUN`: an HTTP server with OpenAI's protocol. `ready: http://HOST:PORT/v1` on stdout when it answers."""

import os
from functools import partial
from pathlib import Path

from luthier.core.log import warn
from luthier.core.versions import is_installed, missing_extra


def main(argv: list[str]) -> int:
    """Serve until a signal comes. Raises `LuthierError` for a run file or an address that cannot be used."""
    from luthier.config.load import read_source
    from luthier.config.runs import InferRun
    from luthier.serve.options import from_environment
    from luthier.workflow.preflight import load_checked, tell_warnings

    for module in ("fastapi", "uvicorn"):
        if not is_installed(module):
            raise missing_extra(module, "serve", "api")
    run = load_checked("infer", read_source(argv), begins=True)
    assert isinstance(run, InferRun)
    options = from_environment(os.environ)
    tell_warnings(run)
    if not options.keys and not options.is_local:
        warn(
            f"everyone who can reach {options.host} can use this model -> set API_KEY, or API_HOST=127.0.0.1 for this"
            " machine alone"
        )

    from luthier.serve.app import build
    from luthier.serve.images import ImageRules
    from luthier.serve.loading import load_model
    from luthier.serve.server import Running, listening_socket

    app, service = build(options)
    folder = None if options.media_folder is None else Path(options.media_folder)
    load = partial(load_model, run, options.model_name, ImageRules(folder=folder, allows_urls=options.allows_urls))
    return Running(app, service, options, load).run(listening_socket(options))
