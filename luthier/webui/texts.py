"""The words of the pages in five languages, one TOML file each in `locales/`, with the same keys.

`key_help/` has the help of the usual keys in the same languages; that of other keys is in English, from their table.
"""

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

LANGUAGES = {"en": "English", "zh": "中文", "ru": "Русский", "ko": "한국어", "ja": "日本語"}
"""Code -> its name in itself."""
_FOLDER, _KEY_HELP = (Path(__file__).with_name(name) for name in ("locales", "key_help"))


@cache
def texts(language: str) -> Mapping[str, str]:
    """`section.key` -> text."""
    tables = tomllib.loads((_FOLDER / f"{language}.toml").read_text(encoding="utf-8"))
    return {f"{section}.{key}": text for section, table in tables.items() for key, text in table.items()}


@cache
def key_help(language: str) -> Mapping[str, str]:
    """Key of a run file -> what it does, for the keys whose help is translated."""
    return tomllib.loads((_KEY_HELP / f"{language}.toml").read_text(encoding="utf-8"))


def preferred(chosen: str | None, accepted: str) -> str:
    """The language that was chosen, or the first that the browser names (`accepted`: its Accept-Language)."""
    if chosen in LANGUAGES:
        return chosen
    codes = [part.partition(";")[0].strip().lower().partition("-")[0] for part in accepted.split(",")]
    return next((code for code in codes if code in LANGUAGES), "en")
