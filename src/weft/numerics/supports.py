"""Supports: which entries of a grid are kept, in the fewest whole bits per entry.

Two forms, the shorter one is taken:

- a bitmap, one bit for every place of the grid;
- gaps: before every kept entry the number of places that are skipped, in a fixed number of bits. A code of
  ones alone skips as many places as it says without keeping one, so that long gaps take several codes and no
  entry needs a filler value. The number of bits is the one that makes the stream shortest.

With entries kept at random at density p, gaps of the best width come within about 10 % of the entropy
h(p) = −p log₂ p − (1−p) log₂ (1−p) bits per place: 0.52 bits at p = 0.1 where a bitmap takes 1, and 8- or
16-bit column indices take 1.6 or more. Both forms know no largest number of columns.

The stream is bytes: codes with the least significant bit first, padded with ones (gaps) or zeros (bitmap);
the last byte is the number of bits of a gap, 0 for a bitmap.

Source: Han et al. 2016, section 2 (relative indices; there zero values are stored at long gaps).
"""

import math

import torch
from torch import Tensor

from weft import checks

# Wider gaps never pay: even a grid of 2^30 places with two entries is shorter with escapes or takes 4 bytes.
_WIDEST = 24


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers as a stream of bits, the least significant first.

    Args:
        codes: shape (count,), integers from 0 to 2^bits − 1.
        bits: bits of each.

    Returns:
        Shape (⌈count · bits / 8⌉,), uint8, padded with zeros.

    Examples:
        >>> pack_bits(torch.tensor([1, 2, 3]), 4)
        tensor([33,  3], dtype=torch.uint8)
    """
    places = torch.arange(bits, device=codes.device)
    stream = ((codes.to(torch.int64)[:, None] >> places) & 1).to(torch.uint8).flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).reshape(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(1, dtype=torch.uint8)


def unpack_bits(stream: Tensor, bits: int) -> Tensor:
    """Undoes `pack_bits`.

    Args:
        stream: shape (bytes,), uint8.
        bits: bits of each number.

    Returns:
        Shape (⌊8 · bytes / bits⌋,), int64: all whole codes that the stream holds, padding included.

    Examples:
        >>> unpack_bits(torch.tensor([33, 3], dtype=torch.uint8), 4)
        tensor([1, 2, 3, 0])
    """
    flat = ((stream[:, None] >> torch.arange(8, dtype=torch.uint8, device=stream.device)) & 1).flatten()
    flat = flat[: len(flat) // bits * bits].reshape(-1, bits).to(torch.int64)
    return (flat << torch.arange(bits, device=stream.device)).sum(1)


def encode_support(mask: Tensor) -> Tensor:
    """The shortest stream for a support.

    Args:
        mask: true where an entry is kept, any shape; taken row-major.

    Returns:
        Shape (bytes,), uint8.

    Examples:
        >>> len(encode_support(torch.eye(64, dtype=torch.bool)))  # 64 gaps of 0 to 64 places in 4,096
        57
    """
    places = mask.flatten().nonzero().squeeze(1)
    gaps = torch.diff(places, prepend=places.new_tensor([-1])) - 1
    bitmap = math.ceil(mask.numel() / 8)
    # An escape of b bits skips 2^b − 1 places.
    sizes = {
        bits: math.ceil(bits * (len(gaps) + int((gaps // ((1 << bits) - 1)).sum())) / 8)
        for bits in range(1, _WIDEST + 1)
    }
    bits = min(sizes, key=sizes.__getitem__)
    if bitmap <= sizes[bits]:
        bits, stream = 0, pack_bits(mask.flatten(), 1)
    else:
        escape = (1 << bits) - 1
        escapes = gaps // escape
        ends = (escapes + 1).cumsum(0) - 1  # where each entry's own code stands, behind its escapes
        codes = torch.full((8 * sizes[bits] // bits + 1,), escape, device=mask.device)
        codes[ends] = gaps % escape
        stream = pack_bits(codes, bits)[: sizes[bits]]
    return torch.cat([stream, stream.new_tensor([bits])])


def decode_support(stream: Tensor, size: int, count: int, argument: str = "support") -> Tensor:
    """Undoes `encode_support`.

    Args:
        stream: what it returned.
        size: the number of places of the grid.
        count: the number of kept entries.
        argument: the stream's name in messages.

    Returns:
        The places of the entries, increasing, shape (count,), int64.

    Raises:
        ValueError: the stream is no support of so many entries in so many places.

    Examples:
        >>> decode_support(encode_support(torch.tensor([[True, False], [False, True]])), 4, 2)
        tensor([0, 3])
    """
    remedy = "load the file that belongs to this model"
    if stream.ndim != 1 or stream.dtype != torch.uint8 or not len(stream):
        got = f"{stream.dtype} of shape {tuple(stream.shape)}"
        raise ValueError(checks.fault(argument, "a stream of bytes", got, remedy))
    bits = int(stream[-1])
    if bits > _WIDEST:
        raise ValueError(checks.fault(argument, f"of gaps of at most {_WIDEST} bits", bits, remedy))
    if not bits:
        places = unpack_bits(stream[:-1], 1).nonzero().squeeze(1)
    else:
        codes = unpack_bits(stream[:-1], bits)
        kept = codes != (1 << bits) - 1
        places = (codes + kept).cumsum(0)[kept] - 1
    # Padding is less than one byte, except that a bitmap knows its own length.
    if len(places) != count or (count and int(places[-1]) >= size):
        got = f"{len(places)} entries" + (f" up to place {int(places[-1])}" if len(places) else "")
        raise ValueError(checks.fault(argument, f"{count} entries in {size} places", got, remedy))
    return places
