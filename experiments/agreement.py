"""What several processes say to one another. One process agrees with itself at once, without a collective."""

from __future__ import annotations

import os

BLOCK = 4096
"""Bytes by which what is said is filled up, so that texts of nearly one length are one compiled program."""


def said_by_all(text: str) -> list[str]:
    """What every process says, in the order of the processes: a collective, which all of them call at the same place.

    Before an error that one process alone may see, so that all raise it and none waits for another that has left; and
    for what one process alone finds out. No text holds NUL.
    """
    import jax

    if jax.process_count() == 1:
        return [text]
    import numpy as np
    from jax.experimental import multihost_utils

    raw = os.fsencode(text)
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(raw)))))
    mine = np.zeros(-(-max(longest, 1) // BLOCK) * BLOCK, np.uint8)
    mine[: len(raw)] = np.frombuffer(raw, np.uint8)
    return [
        os.fsdecode(bytes(said).rstrip(b"\0")) for said in np.asarray(multihost_utils.process_allgather(mine))
    ]


def first_says(number: int) -> int:
    """Process 0's number: a collective. For what is seen on a shared file system, which may show the others a file later."""
    import jax

    if jax.process_count() == 1:
        return number
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
