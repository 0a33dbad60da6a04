"""`luthier schema`: the JSON Schema of a run file, for editors."""

import json

from luthier.config.describe import schema
from luthier.core.errors import InvalidInput


def main(argv: list[str]) -> int:
    if argv:
        raise InvalidInput(f"schema: takes no arguments, but got {' '.join(argv)}")
    print(json.dumps(schema(), indent=2, ensure_ascii=False))
    return 0
