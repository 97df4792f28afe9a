"""How glibc hands freed memory back: what XLA:CPU's scratch memory costs. Standard library only."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep freed memory for reuse instead of handing it back to the kernel; True where that worked.

    XLA:CPU allocates a step's whole scratch memory afresh for every step. Above malloc's mmap threshold (32 MiB at
    most) each such block is mapped and zeroed page by page again: 140,000 page faults and a fifth of the processor time
    of a step with 550 MiB of scratch memory. Call it before the first array is made; it changes the whole process.
    The threads that compile a program then wait for each other: one compilation takes a quarter longer on two cores.
    Elsewhere than on glibc it does nothing and returns False. (glibc manual, 3.2.3.9 Malloc Tunable Parameters.)
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    # One arena: only the main one can grow to such blocks without mapping them.
    return all(
        mallopt(option, value) == 1 for option, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1))
    )
