"""Tokens that belong to the block of an image, a video or audio. They are whole numbers that know their item.

So truncation sees blocks without a list of positions beside every list of ids: a cut list still knows them.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import attrgetter

_ITEM = attrgetter("item")


class BlockToken(int):
    """The id of a token in the block of `item`, counted from 0 in its row."""

    item: int

    @classmethod
    def of(cls, token: int, item: int) -> "BlockToken":
        made = cls(token)
        made.item = item
        return made


def num_block_tokens(ids: Sequence[int]) -> int:
    """The tokens of all blocks in `ids`."""
    return list(map(type, ids)).count(BlockToken)


def as_block(ids: list[int], start: int, stop: int, item: int) -> None:
    """Make the tokens from `start` up to `stop` the block of `item`."""
    tokens = ids[start:stop]
    shared = {token: BlockToken.of(token, item) for token in set(tokens)}
    ids[start:stop] = map(shared.__getitem__, tokens)


def with_blocks(ids: Sequence[int], blocks: Sequence[int]) -> list[int]:
    """The ids with the blocks at these places (start, stop, start, stop, ...)."""
    tokens = list(ids)
    for item, (start, stop) in enumerate(zip(blocks[::2], blocks[1::2], strict=True)):
        as_block(tokens, start, stop, item)
    return tokens


def blocks_in(ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(item, start, stop) of every block, in order."""
    types = list(map(type, ids))  # searched much faster than the items of the tokens
    stop = 0
    while (start := _index(types, BlockToken, stop)) < len(types):
        stop = _index(types, int, start)
        if _ITEM(ids[start]) == _ITEM(ids[stop - 1]):
            yield _ITEM(ids[start]), start, stop
            continue
        for item, block in groupby(ids[start:stop], key=_ITEM):  # blocks without a token between them
            end = start + len(list(block))
            yield item, start, end
            start = end


def _index(types: list[type], searched: type, begin: int) -> int:
    """Where the next one is; the end if there is none."""
    try:
        return types.index(searched, begin)
    except ValueError:
        return len(types)


def first_whole(ids: list[int], num_tokens: int) -> list[int]:
    """The first `num_tokens` ids, and fewer where a block would be cut."""
    if 0 < num_tokens < len(ids) and isinstance(ids[num_tokens], BlockToken):
        item = getattr(ids[num_tokens], "item", -1)
        while num_tokens and getattr(ids[num_tokens - 1], "item", -1) == item:
            num_tokens -= 1
    return ids[:num_tokens]


def first_around(ids: Sequence[int], num_text: int) -> list[int]:
    """All blocks, and of the text around them the first `num_text` tokens."""
    kept: list[int] = []
    for token in ids:
        if isinstance(token, BlockToken):
            kept.append(token)
        elif num_text:
            kept.append(token)
            num_text -= 1
    return kept
