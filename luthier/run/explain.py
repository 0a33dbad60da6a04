"""`luthier explain KEY ...`: what a key does, its type and default, who reads it and which rules it has."""

from luthier.config.describe import explain
from luthier.core.errors import InvalidInput


def main(argv: list[str]) -> int:
    if not argv:
        raise InvalidInput(
            "explain: which key? e.g. `luthier explain lora_rank`; docs/reference/keys.md lists them all"
        )
    print("\n\n".join(explain(name) for name in argv))
    return 0
