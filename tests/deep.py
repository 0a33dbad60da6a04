"""JSON that is nested too deep: Python reads the first of these depths, and has no frames left for the others."""

DEPTHS = (102, 500, 900, *range(930, 1000, 5), 1000, 100_000)
"""Of lists inside each other."""


def deep_list(depth: int) -> str:
    return "[" * depth + "]" * depth


def deep_tools(depth: int) -> str:
    """A list of tools whose innermost list is at this depth."""
    return f'[{{"name": "f", "parameters": {deep_list(depth - 2)}}}]'
