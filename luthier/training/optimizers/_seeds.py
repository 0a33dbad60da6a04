"""Seeds derived from known numbers, so that random choices can be repeated after resuming from a checkpoint."""

import random


def seed_from(*numbers: int) -> int:
    """A seed for torch that differs wherever one of the numbers does."""
    return random.Random(" ".join(map(str, numbers))).getrandbits(63)
