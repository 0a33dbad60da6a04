"""The key reference, `docs/reference/keys.md`: `python -m luthier.config.reference [--check]` writes or compares it."""

import sys
from pathlib import Path

from luthier.config.decode import describe_type
from luthier.config.describe import help_of, shown, status_of
from luthier.config.key_table import Key, keys_of, sections
from luthier.config.sections import Section

FILE = Path(__file__).parents[2] / "docs" / "reference" / "keys.md"
HEAD = """\
# Keys of a run file

Written by `make keys` from the sources; do not edit. `luthier explain KEY` says the same about one key, and what it
excludes. A list may be written with commas. The status says what this version does with a key:

- *supported*
- *no effect*: accepted; any value but the default is a warning with the reason
- *refused*: known; any value but the default is an error with the reason and the remedy
- *later*: read by a variant that this version does not have; a warning says so
- *renamed*: accepted under its former name
"""


def markdown() -> str:
    """The whole page: one table per owner."""
    return "\n".join([HEAD, *(_table(section) for section in sections() if keys_of(section))])


def _table(section: Section) -> str:
    lines = [f"## {section.name}\n", f"Read by {section.reader()}.\n"]
    lines += ["| key | type | default | what it does | status |", "|---|---|---|---|---|"]
    lines += [_row(key) for key in keys_of(section)]
    return "\n".join([*lines, ""])


def _row(key: Key) -> str:
    words = {"no_effect": "no effect"}.get(key.status, key.status)
    status = status_of(key) if key.reason else words
    default = "required" if key.is_required else f"`{shown(key.default)}`"
    cells = [f"`{key.name}`", describe_type(key.type, key.choices), default, help_of(key), status]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main(argv: list[str]) -> int:
    text = markdown()
    if "--check" in argv:
        is_same = FILE.is_file() and FILE.read_text(encoding="utf-8") == text
        print(f"{FILE.name} is up to date" if is_same else f"{FILE} is out of date: run `make keys`")
        return 0 if is_same else 1
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
