"""Seeds of random generators, from a run's seed and the name of a stream."""

from __future__ import annotations

import hashlib


def seed_of(seed: int, *stream: object) -> int:
    """A 63-bit seed for one generator, independent between any two different arguments.

    Args:
        seed: the run's seed.
        stream: such as "noise" and the index of the image.
    """
    words = "/".join(map(str, (seed, *stream)))
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
