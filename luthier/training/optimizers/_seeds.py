"""Seeds of random choices that can be drawn again after a checkpoint, since they follow from numbers that are known."""

import random


def seed_from(*numbers: int) -> int:
    """A seed for torch that differs wherever one of the numbers does."""
    return random.Random(" ".join(map(str, numbers))).getrandbits(63)
