"""One hash from a run's seed, and what is drawn, to the seed of a generator."""

from __future__ import annotations

import hashlib


def seed_of(seed: int, *stream: object) -> int:
    """A 63-bit seed for one generator, independent between any two different arguments.

    Args:
        seed: the run's seed.
        stream: what is drawn and for which, such as "noise" and the index of the image.
    """
    words = "/".join(map(str, (seed, *stream)))
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
