"""Pure functions of a key: random streams, and hashes that name things.

Every random number of a run is a function of (seed, step, row id, sample index, purpose), never of
what was drawn before. So a resumed run repeats the numbers of one that was never stopped.
"""

import hashlib
import json

import numpy as np


def rng(*key) -> np.random.Generator:
    """A random stream that depends on its key alone, such as (seed, step, row id, purpose)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def hash_of(value) -> str:
    """Hexadecimal SHA-256 of a value as JSON; what JSON cannot hold is hashed as its str()."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
