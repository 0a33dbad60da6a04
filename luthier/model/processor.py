"""The processor of a model that reads more than text: its files travel with the weights.

Nothing here changes how pictures or sound are prepared, so the files are copied as they are; together with the
tokenizer beside them they are what `AutoProcessor` loads.
"""

import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.log import warn
from luthier.model.hubs import fetched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def copy_processor(model: "PreTrainedModel", folder: Path) -> None:
    """Put the processor of the checkpoint that `model` was loaded from into `folder`, if it has one."""
    source = model.config._name_or_path
    if not model.config.sub_configs or not source:
        return
    files = [file for name in PROCESSOR_FILES if (file := _find(source, name)) is not None]
    for file in files:
        if file.parent.resolve() != folder.resolve():
            shutil.copyfile(file, folder / file.name)
    if not files:
        _say_missing(source)


@cache
def _say_missing(source: str) -> None:
    warn(f"{source} has no files of a processor, so none are saved with the weights, and pictures cannot be read")


def _find(source: str, name: str) -> Path | None:
    path = Path(fetched(source)).expanduser()
    if path.is_dir():
        return path / name if (path / name).is_file() else None
    from transformers.utils.hub import cached_file

    found = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(found) if found else None
