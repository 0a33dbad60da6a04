"""One check of `make check-gpu`, and all of them as JSON and as a table."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Check:
    group: str
    name: str
    status: Literal["ok", "failed", "skipped"]
    figures: dict[str, float] = field(default_factory=dict)
    """Name with its unit -> value."""
    remark: str = ""
    """Why it failed or was skipped."""


def append(path: Path, check: Check) -> None:
    """Add a line, so that what was found stays if a later check ends the process."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(check)) + "\n")


def read(path: Path) -> list[Check]:
    if not path.is_file():
        return []
    return [Check(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def table(checks: Sequence[Check]) -> str:
    lines = ["| group | check | result | figures | remarks |", "|---|---|---|---|---|"]
    for check in checks:
        figures = ", ".join(f"{name} {value:,.4g}" for name, value in check.figures.items())
        remark = " ".join(check.remark.replace("|", "/").split())
        lines.append(f"| {check.group} | {check.name} | {check.status} | {figures} | {remark} |")
    return "\n".join(lines)


def write(folder: Path, checks: Sequence[Check], facts: dict[str, str]) -> tuple[Path, Path]:
    """Writes check-gpu.json and check-gpu.md. `facts`: device, versions and date."""
    as_json, page = folder / "check-gpu.json", folder / "check-gpu.md"
    whole = {**facts, "checks": [asdict(check) for check in checks]}
    as_json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    where = "; ".join(f"{name}: {value}" for name, value in facts.items())
    page.write_text(f"{where}\n\n{table(checks)}\n", encoding="utf-8")
    return as_json, page
