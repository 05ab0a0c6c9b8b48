"""How the worker takes memory from the system, keeps it between the layers of a network, and returns it when idle.

A layer's output is freed some layers later. The C library gives pieces of that size back to the system at once, and the
system hands them out again page by page, cleared: a tenth of a picture's time.
"""

import ctypes
import os
import sys

# Ask the system for memory in pages of 2 MiB where it leaves that to the program: handing out a gigabyte in pages of
# 4 KiB takes longer than filling it, and a network of full size takes and returns hundreds of them in a picture.
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}  # read by torch

# mallopt(3): what to set, to which value, and the variables by which a user sets it.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER_TRIM, NEVER_MAP = -1, 0
USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def prepare_memory() -> None:
    """Sets what the user has not set; for a process that has not imported torch."""
    for name, value in HUGE_PAGES.items():
        os.environ.setdefault(name, value)
    if not any(name in os.environ for name in USERS_OWN):
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """From now on freed memory stays in this process, for the next who asks; False where that cannot be set."""
    mallopt = _function("mallopt")
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, NEVER_MAP) and mallopt(M_TRIM_THRESHOLD, NEVER_TRIM))


def return_freed_memory() -> bool:
    """Give freed memory back to the system; False where there was none, or it cannot be told to."""
    trim = _function("malloc_trim")
    return trim is not None and bool(trim(0))


def _function(name: str) -> "ctypes._NamedFuncPointer | None":
    """A function of the GNU C library; None on systems with another."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
