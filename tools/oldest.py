"""The oldest versions that pyproject.toml allows, as constraints for pip: `make test-oldest` runs the tests with them.

python -m tools.oldest > oldest.txt
pip install --editable ".[test]" --constraint oldest.txt
"""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def expanded(requirements: Sequence[str], extras: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """`luthier[serve]` is what the extra `serve` requires."""
    for requirement in requirements:
        own = re.fullmatch(r"luthier\[(.+)]", requirement)
        if own is None:
            yield requirement
        else:
            for name in own[1].split(","):
                yield from expanded(extras[name], extras)


def oldest(requirement: str) -> str:
    """`ray[tune]>=2.51` -> `ray==2.51`"""
    bound = re.match(r"([\w.-]+)(?:\[[^]]*])?[>=]=([\w.]+)", requirement)
    assert bound is not None, f"pyproject.toml: {requirement} names no oldest version"
    return f"{bound[1]}=={bound[2]}"


def main() -> None:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    found = map(oldest, expanded([*project["dependencies"], *extras["test"]], extras))
    print("\n".join(sorted(set(found), key=str.lower)))


if __name__ == "__main__":
    main()
