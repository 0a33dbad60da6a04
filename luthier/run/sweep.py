"""`luthier sweep RUN key=a,b ...`: train every combination of these values, and print one table."""


def main(argv: list[str]) -> int:
    """Return 0 if all runs are done, 1 if one failed, 130 if a signal stopped the sweep."""
    from luthier.workflow.sweep import sweep

    table, was_stopped = sweep(argv)
    print(table.as_text())
    if was_stopped:
        return 130
    return 0 if table.num_done == len(table.rows) else 1
