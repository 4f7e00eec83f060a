"""Advice to the system about memory pages: large ones for weights read over and over, none for those read once.

Decoding reads every weight once a token. In pages of 4 KB the processor's prefetcher starts anew at each page and the
address translation misses; in pages of 2 MB a decode step takes 4 to 6% less (docs/LOG.md has the figures).

All of this is advice: numbers stay what they are, and where the system has no such call nothing happens.
"""

import ctypes
import os
import sys

import torch
from torch import Tensor, nn

SMALL_PAGE, LARGE_PAGE = 4096, 2**21
HUGEPAGE, PAGEOUT = 14, 21  # Linux's MADV_HUGEPAGE and MADV_PAGEOUT
ALIGNMENT_BYTES = 64  # of a tensor in the arena: a cache line
MEMORY_SHARE = 0.5  # of the memory that is free now, for weights to be copied


def settle_(model: nn.Module) -> bool:
    """Copy the weights into one piece of memory with large pages; False where that cannot be had.

    A mapped file is left behind, so its pages no longer count as the process's own. Weights that would take more than
    half of the free memory stay where they are.
    """
    tensors = list({id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    room = _up(sum(_up(t.nbytes, ALIGNMENT_BYTES) for t in tensors), LARGE_PAGE) + LARGE_PAGE
    if any(t.device.type != "cpu" for t in tensors) or room > MEMORY_SHARE * available_bytes():
        return False
    arena = torch.empty(room, dtype=torch.uint8)
    if not ask_for_large(arena):
        return False
    at = -arena.data_ptr() % LARGE_PAGE
    with torch.no_grad():
        for tensor in tensors:
            place = arena[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor.data)
            release(tensor.data)
            tensor.data = place
            at += _up(tensor.nbytes, ALIGNMENT_BYTES)
    return True


def ask_for_large(tensor: Tensor) -> bool:
    """Large pages for memory that nothing was written to yet; whether the system took the advice."""
    return _advise(tensor, HUGEPAGE, LARGE_PAGE)


def release(tensor: Tensor) -> None:
    """These pages are not needed now: those of a mapped file leave the resident memory."""
    _advise(tensor, PAGEOUT, SMALL_PAGE)


def available_bytes() -> int:
    """Memory that can be had without swapping (Linux; 0 elsewhere)."""
    if not sys.platform.startswith("linux"):
        return 0
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _advise(tensor: Tensor, advice: int, page_bytes: int) -> bool:
    """madvise on the whole pages inside of a tensor; whether the system took it."""
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux") or os.sysconf("SC_PAGE_SIZE") != SMALL_PAGE:
        return False
    start = _up(tensor.data_ptr(), page_bytes)
    stop = (tensor.data_ptr() + tensor.nbytes) // page_bytes * page_bytes
    length = ctypes.c_size_t(stop - start)
    return stop > start and ctypes.CDLL(None).madvise(ctypes.c_void_p(start), length, advice) == 0
