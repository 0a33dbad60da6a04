"""The lengths of rows, and the share of tokens that a `cutoff_len` keeps."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count, dropwhile
from math import ceil
from statistics import median_low
from typing import Any

SHARE_KEPT = 0.99
MAX_BARS = 12
BAR_CHARS = 40


def measured(lengths: Sequence[int], cutoff_len: int) -> dict[str, Any]:
    """Statistics of lengths in tokens. The histogram is [first length, last length, rows] for up to `MAX_BARS` bins."""
    ascending = sorted(lengths)
    longest, total = ascending[-1], sum(ascending)
    width = _round_width(longest)
    bins = Counter(length // width for length in ascending)
    return {
        "rows": len(ascending),
        "tokens": total,
        "median": median_low(ascending),
        "longest": longest,
        "cutoff_len": cutoff_len,
        "longer_than_cutoff_len": sum(length > cutoff_len for length in ascending),
        "kept_share": sum(min(length, cutoff_len) for length in ascending) / total,
        "cutoff_len_for_99_percent": smallest_cutoff(ascending, SHARE_KEPT),
        "histogram": [[i * width, (i + 1) * width - 1, bins[i]] for i in range(longest // width + 1)],
    }


def smallest_cutoff(ascending: Sequence[int], share: float) -> int:
    """The smallest c with sum_i min(length_i, c) >= share * sum_i length_i.

    Between two neighboring lengths, each token of c adds the number of longer rows to the sum.
    """
    wanted, kept, at = share * sum(ascending), 0, 0
    for num_shorter, length in enumerate(ascending):
        num_longer = len(ascending) - num_shorter
        gained = (length - at) * num_longer
        if kept + gained >= wanted:
            return at + ceil((wanted - kept) / num_longer)
        kept, at = kept + gained, length
    return at


def bars(measures: dict[str, Any]) -> Iterator[str]:
    """The histogram as lines of text."""
    cutoff_len, most = measures["cutoff_len"], max(rows for *_, rows in measures["histogram"])
    yield f"tokens of a row (median {measures['median']}, longest {measures['longest']}):"
    digits = len(str(measures["histogram"][-1][1]))
    for first, last, rows in dropwhile(lambda bin_: not bin_[2], measures["histogram"]):
        bar = "█" * ceil(rows * BAR_CHARS / most)
        mark = "  < cutoff_len" if first <= cutoff_len <= last else ""
        yield f"  {first:>{digits}} to {last:>{digits}} {bar}{' ' * bool(bar)}{rows}{mark}"
    yield (
        f"cutoff_len {cutoff_len} keeps {measures['kept_share']:.2%} of the tokens,"
        f" {measures['longer_than_cutoff_len']} of {measures['rows']} rows are longer;"
        f" the smallest that keeps {SHARE_KEPT:.0%} is {measures['cutoff_len_for_99_percent']}"
    )


def _round_width(longest: int) -> int:
    """1, 2 or 5 times a power of ten."""
    widths = (first_digit * 10**zeros for zeros in count() for first_digit in (1, 2, 5))
    return next(width for width in widths if longest // width < MAX_BARS)
