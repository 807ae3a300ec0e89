"""Keep memory that was freed, rather than give it back to the system. Needs no torch.

glibc gives every large block that is freed back to the kernel, and asks for it again a moment later: each
of its pages is then cleared and mapped anew at the first touch. A network whose layers make and free
activations of many megabytes spends up to half of its time on that.
"""

from __future__ import annotations

import ctypes
import sys

# Of malloc.h. A threshold of -1 means never.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
# How much the heap grows at least.
TOP_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; peak memory stays with it until it ends.

    Only what is asked for from now on is kept, so call it before any long work. Nothing happens where the C
    library is not glibc (macOS, Windows, musl).

    Returns:
        Whether the C library does so from now on.
    """
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # other libraries have a mallopt that means less
        settings = (
            (M_MMAP_MAX, 0),
            (M_TRIM_THRESHOLD, -1),
            (M_TOP_PAD, TOP_PAD_BYTES),
            # The other heaps that threads get hold 64 MB at most: what is larger would be mapped after all.
            (M_ARENA_MAX, 1),
        )
        return all(libc.mallopt(name, value) == 1 for name, value in settings)
    except (OSError, AttributeError):  # nothing can be loaded, or there is no such function
        return False
