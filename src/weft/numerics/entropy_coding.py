"""Entropy coding of stored tensors: every symbol in as many bits as its frequency says.

A tensor's bytes are divided into planes whose symbols have something in common: whole numbers of one byte are
one plane, of larger numbers the first bytes are one plane, the second another, and so on (exponents of
floating-point numbers repeat, the low bits of mantissas do not). A plane is read as a stream of bits, row by
row along the tensor's last axis, and cut into symbols: bytes, or where the numbers are bytes already, of 1 to
8 bits, whichever width makes it shortest. So the packed codes of a quantised matrix come back as codes, gaps
between kept entries as gaps. No family is asked what its bytes mean.

The symbols of a plane are coded with their own frequencies, rounded to 16 bits:

    "range"     range coding by the package `constriction`, within 0.01 % of the entropy (the default);
    "huffman"   whole bits for every symbol, by zlib of the standard library: about 1 % more, far more only
                where a symbol should take less than a bit; no package needed.

A plane that does not get shorter is stored as it is. `entropy_bound` says what no coder of this kind beats:
the planes' zeroth-order entropies at the best widths, without tables.

Source: Huffman 1952; Martin 1979 (range encoding); Han et al. 2016, section 4; Bamler 2022 (constriction).
"""

import importlib
import math
import struct
import zlib
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weft import checks

CODERS = ("range", "huffman")

_Bytes = NDArray[np.uint8]
# Frequencies are whole multiples of 2⁻¹⁶, so that no rounding of floating-point numbers can come between the
# writer's table and the reader's.
_PRECISION = 16
# The first byte of a coded plane: 0 as it is, b range-coded symbols of b bits, 8 + b Huffman-coded ones.
_RAW, _HUFFMAN = 0, 8


class DamagedError(Exception):
    """A coded tensor that cannot be decoded."""


def _planes(tensor: Tensor) -> list[_Bytes]:
    """The bytes of a tensor as planes, each of shape (rows, bytes of a row)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    width = tensor.element_size()
    raw = flat.view(torch.uint8).numpy().reshape(-1, width)
    columns = tensor.shape[-1] if tensor.ndim > 1 else tensor.numel()
    return [np.ascontiguousarray(raw[:, place]).reshape(-1, max(columns, 1)) for place in range(width)]


def _symbols(plane: _Bytes, bits: int) -> _Bytes:
    """Every row as a stream of bits, cut into symbols; the last symbol of a row may hold fewer."""
    if bits == 8:
        return plane.reshape(-1)
    stream = np.unpackbits(plane, axis=1, bitorder="little")
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % bits)))
    packed = np.packbits(stream.reshape(-1, bits), axis=1, bitorder="little")
    return packed.reshape(-1)


def _join(symbols: _Bytes, bits: int, shape: tuple[int, int]) -> _Bytes:
    """Undoes `_symbols`."""
    rows, columns = shape
    if bits == 8:
        return symbols.reshape(rows, columns)
    stream = np.unpackbits(symbols[:, None], axis=1, count=bits, bitorder="little")
    stream = stream.reshape(rows, -1)[:, : 8 * columns]
    return np.packbits(stream, axis=1, bitorder="little")


def _entropy(counts: NDArray[np.int64]) -> float:
    """Bits that the symbols with these counts take together."""
    used = counts[counts > 0].astype(np.float64)
    return float((used * np.log2(used.sum() / used)).sum())


def _widths(plane: _Bytes, planes: int) -> dict[int, NDArray[np.int64]]:
    """The counts of the symbols of every width that is tried."""
    widths = range(1, 9) if planes == 1 else (8,)
    return {bits: np.bincount(_symbols(plane, bits), minlength=1 << bits) for bits in widths}


def entropy_bound(tensor: Tensor) -> int:
    """The bytes that a tensor's symbols take at their zeroth-order entropy, without tables.

    Args:
        tensor: any dtype and shape.

    Returns:
        The number of bytes, rounded up; at most the tensor's own.

    Examples:
        >>> entropy_bound(torch.zeros(1000, dtype=torch.uint8))
        0
    """
    if not tensor.numel():
        return 0
    planes = _planes(tensor)
    bits = sum(min(map(_entropy, _widths(plane, len(planes)).values())) for plane in planes)
    return min(math.ceil(bits / 8), tensor.nbytes)


def _frequencies(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts rounded so that they add up to 2^16 and none that occurs becomes zero."""
    total = 1 << _PRECISION
    rounded = np.maximum(np.round(counts * (total / counts.sum())).astype(np.int64), counts > 0)
    rounded[np.argmax(rounded)] += total - rounded.sum()
    return rounded


def _table(frequencies: NDArray[np.int64]) -> bytes:
    """A bit for every symbol, whether it occurs, and the frequencies of those that do, less one."""
    used = frequencies > 0
    return np.packbits(used, bitorder="little").tobytes() + (frequencies[used] - 1).astype("<u2").tobytes()


def _read_table(data: bytes, bits: int) -> tuple[NDArray[np.int64], int]:
    """The frequencies, and how many bytes they took."""
    start = math.ceil((1 << bits) / 8)
    used = np.unpackbits(np.frombuffer(data[:start], np.uint8), count=1 << bits, bitorder="little") > 0
    end = start + 2 * int(used.sum())
    frequencies = np.zeros(1 << bits, np.int64)
    frequencies[used] = np.frombuffer(data[start:end], "<u2").astype(np.int64) + 1
    return frequencies, end


def _model(constriction: ModuleType, frequencies: NDArray[np.int64]) -> object:
    probabilities = frequencies.astype(np.float64) / (1 << _PRECISION)
    return constriction.stream.model.Categorical(probabilities, perfect=False)


def _encode_plane(plane: _Bytes, planes: int, coder: str) -> bytes:
    raw = bytes([_RAW]) + plane.tobytes()
    if not plane.size:
        return raw
    counts = _widths(plane, planes)
    if coder == "huffman":
        best = min(counts, key=lambda bits: _entropy(counts[bits]))
        return min(raw, *(_deflate(plane, bits) for bits in {8, best}), key=len)
    constriction = _package()
    lengths = {
        bits: _entropy(count) / 8 + (1 << bits) / 8 + 2 * int((count > 0).sum())
        for bits, count in counts.items()
    }
    bits = min(lengths, key=lengths.__getitem__)
    if lengths[bits] >= plane.size:
        return raw
    frequencies = _frequencies(counts[bits])
    encoder = constriction.stream.queue.RangeEncoder()
    used = int((frequencies > 0).sum())
    if used > 1:  # a single symbol needs no bits, and the coder's models need two
        encoder.encode(_symbols(plane, bits).astype(np.int32), _model(constriction, frequencies))
    coded = bytes([bits]) + _table(frequencies) + encoder.get_compressed().astype("<u4").tobytes()
    return min(coded, raw, key=len)


def _deflate(plane: _Bytes, bits: int) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return bytes([_HUFFMAN + bits]) + deflate.compress(_symbols(plane, bits).tobytes()) + deflate.flush()


def _inflate(data: bytes, count: int) -> _Bytes:
    inflate = zlib.decompressobj(-15)
    plain = inflate.decompress(data, count + 1)
    if not inflate.eof or inflate.unused_data or len(plain) != count:
        raise DamagedError("its Huffman stream ends in the wrong place")
    return np.frombuffer(plain, np.uint8)


def _decode_plane(data: bytes, shape: tuple[int, int]) -> _Bytes:
    kind, data = data[0], data[1:]
    if kind == _RAW:
        if len(data) != shape[0] * shape[1]:
            raise DamagedError(f"it holds {len(data)} bytes of {shape[0] * shape[1]}")
        return np.frombuffer(data, np.uint8).reshape(shape)
    if kind > 2 * _HUFFMAN:
        raise DamagedError(f"it names the unknown coder {kind}")
    bits = kind - _HUFFMAN if kind > _HUFFMAN else kind
    count = shape[0] * math.ceil(8 * shape[1] / bits)
    if kind > _HUFFMAN:
        return _join(_inflate(data, count), bits, shape)
    frequencies, start = _read_table(data, bits)
    if frequencies.sum() != 1 << _PRECISION:
        raise DamagedError("its frequencies do not add up")
    if int((frequencies > 0).sum()) == 1:
        return _join(np.full(count, np.argmax(frequencies), np.uint8), bits, shape)
    stream = np.frombuffer(data[start:], "<u4").astype(np.uint32)
    model = _model(_package(), frequencies)
    symbols = _package().stream.queue.RangeDecoder(stream).decode(model, count)
    return _join(symbols.astype(np.uint8), bits, shape)


def check_coder(coder: str) -> None:
    """Checks that a coder is known and its package at hand, before long work whose result it shall write.

    An unknown coder is a ValueError, a missing package an ImportError that says how it is installed.

    Args:
        coder: "range" or "huffman".
    """
    checks.one_of("entropy_coding", coder, CODERS)
    if coder == "range":
        _package()


def encode_tensor(tensor: Tensor, coder: str = "range") -> bytes:
    """Codes a tensor; dtype and shape are the caller's to keep.

    Where the coder's package is missing, an ImportError says how it is installed.

    Args:
        tensor: any dtype and shape.
        coder: "range" or "huffman".

    Returns:
        A checksum of the tensor's bytes, then the planes, each with its length.

    Examples:
        >>> codes = torch.tensor([0, 0, 0, 1] * 1000, dtype=torch.uint8)
        >>> len(encode_tensor(codes, "huffman")) < 1000
        True
    """
    check_coder(coder)
    planes = _planes(tensor)
    coded = [_encode_plane(plane, len(planes), coder) for plane in planes]
    parts = [struct.pack("<I", _checksum(planes))]
    for part in coded:
        parts += [struct.pack("<Q", len(part)), part]
    return b"".join(parts)


def decode_tensor(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Undoes `encode_tensor`.

    Args:
        data: what it returned.
        dtype: the tensor's.
        shape: the tensor's.

    Returns:
        The same tensor, bit for bit.

    Raises:
        DamagedError: the data are damaged.
        ImportError: the coder's package is missing.

    Examples:
        >>> codes = torch.randint(0, 3, (20, 30), dtype=torch.uint8)
        >>> torch.equal(decode_tensor(encode_tensor(codes, "huffman"), torch.uint8, (20, 30)), codes)
        True
    """
    count = math.prod(shape)
    columns = max(shape[-1] if len(shape) > 1 else count, 1)
    rows = count // columns if count else 0
    try:
        (checksum,) = struct.unpack_from("<I", data)
        planes, start = [], 4
        for _ in range(torch.empty(0, dtype=dtype).element_size()):
            (length,) = struct.unpack_from("<Q", data, start)
            start += 8
            if start + length > len(data) or not length:
                raise DamagedError("a part of it is missing")
            planes.append(_decode_plane(data[start : start + length], (rows, columns)))
            start += length
    except (DamagedError, ImportError):
        raise
    except Exception as error:  # struct, zlib, numpy and the coder each have words of their own for bad data
        raise DamagedError(str(error)) from error
    if start != len(data):
        raise DamagedError(f"{len(data) - start} bytes are left over")
    if _checksum(planes) != checksum:
        raise DamagedError("its checksum is another")
    stacked = np.stack([plane.reshape(-1) for plane in planes], axis=1)
    return torch.from_numpy(stacked.copy()).reshape(-1).view(dtype).reshape(tuple(shape))


def _checksum(planes: Sequence[_Bytes]) -> int:
    value = 0
    for plane in planes:
        value = zlib.crc32(plane.tobytes(), value)
    return value


def _package() -> ModuleType:
    try:
        return importlib.import_module("constriction")
    except ModuleNotFoundError as error:
        remedy = "run: pip install 'weft[entropy]', or save with entropy_coding=\"huffman\""
        expected = "installed for range-coded files"
        raise ImportError(
            checks.fault("package constriction", expected, "no module of that name", remedy)
        ) from error
