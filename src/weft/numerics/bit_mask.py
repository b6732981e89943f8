"""Which of many things are chosen, one bit for each."""

import torch
from torch import Tensor


def mask_bytes(count: int) -> int:
    """How many bytes the bits of so many things fill.

    Args:
        count: the number of things.

    Returns:
        The number of bytes.
    """
    return -(-count // 8)


def mask_of(chosen: Tensor, count: int) -> Tensor:
    """Which of many things are among the chosen.

    Args:
        chosen: their indices.
        count: how many things there are.

    Returns:
        The mask, shape (count,), bool.
    """
    marked = torch.zeros(count, dtype=torch.bool, device=chosen.device)
    marked[chosen] = True
    return marked


def packed(marked: Tensor) -> Tensor:
    """Packs a mask into bytes, the first ones in the low bits of the first byte.

    Args:
        marked: which are chosen, shape (count,), bool.

    Returns:
        The bytes, shape (⌈count / 8⌉,), uint8.
    """
    bits = torch.zeros(mask_bytes(len(marked)) * 8, dtype=torch.uint8, device=marked.device)
    bits[: len(marked)] = marked
    weights = 2 ** torch.arange(8, device=marked.device)
    return (bits.reshape(-1, 8) * weights).sum(1).to(torch.uint8)


def unpacked(stored: Tensor, count: int) -> Tensor:
    """Undoes `packed`.

    Args:
        stored: the bytes, shape (⌈count / 8⌉,).
        count: how many things there are.

    Returns:
        Which are chosen, shape (count,), bool.
    """
    shifts = torch.arange(8, device=stored.device)
    return ((stored[:, None] >> shifts) & 1).flatten()[:count].bool()


def places_of(marked: Tensor) -> Tensor:
    """Where each one stands once the chosen ones come first, then the others, both in their own order.

    Args:
        marked: which are chosen, shape (count,), bool.

    Returns:
        The places, shape (count,), int64.
    """
    return torch.where(marked, marked.cumsum(0), marked.sum() + (~marked).cumsum(0)) - 1
