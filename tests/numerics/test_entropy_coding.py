"""Entropy coding: bit for bit back, near the entropy, and damage is noticed."""

import builtins
import importlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.numerics.entropy_coding import (
    CODERS,
    DamagedError,
    check_coder,
    decode_tensor,
    encode_tensor,
    entropy_bound,
)
from weft.numerics.supports import pack_bits


@pytest.fixture(params=CODERS)
def coder(request: pytest.FixtureRequest) -> str:
    if request.param == "range":
        pytest.importorskip("constriction")
    return request.param


def skewed(*shape: int, symbols: int = 16) -> Tensor:
    """Packed codes of four bits that follow a geometric distribution, and their entropy in bits each."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(shape, generator=generator, dtype=torch.float64)
    return (draws.log() / math.log(0.6)).floor().clamp_max(symbols - 1).to(torch.uint8)


TENSORS = {
    "float32": torch.randn(30, 40, generator=torch.Generator().manual_seed(0)),
    "bfloat16": torch.randn(30, 41, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "float64": torch.randn(7, generator=torch.Generator().manual_seed(0)).double(),
    "bytes": skewed(33, 17),
    "booleans": torch.rand(50, generator=torch.Generator().manual_seed(0)) < 0.1,
    "int64": torch.arange(300).reshape(3, 10, 10),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 4),
    "constant": torch.zeros(100, 8),
    "every byte": torch.arange(256).to(torch.uint8),
    "not finite": torch.tensor([float("nan"), float("inf"), -0.0, 0.0]),
    "strided": torch.randn(20, 30).T,
}


@pytest.mark.parametrize("name", TENSORS)
def test_every_tensor_comes_back_bit_for_bit(name: str, coder: str) -> None:
    tensor = TENSORS[name]
    again = decode_tensor(encode_tensor(tensor, coder), tensor.dtype, tensor.shape)
    assert again.dtype == tensor.dtype
    assert again.shape == tensor.shape
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    assert torch.equal(again.reshape(-1).view(torch.uint8), raw)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 255), st.integers(0, 2**31))
def test_any_bytes_come_back(rows: int, columns: int, largest: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(0, largest + 1, (rows, columns), generator=generator).to(torch.uint8)
    for name in CODERS if importlib.util.find_spec("constriction") else CODERS[1:]:
        assert torch.equal(decode_tensor(encode_tensor(tensor, name), torch.uint8, tensor.shape), tensor)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_codes_take_their_own_entropy(bits: int, coder: str) -> None:
    codes = skewed(200 * 1000, symbols=1 << bits)
    share = torch.bincount(codes.int()).double() / codes.numel()
    entropy = float(-(share * share.clamp_min(1e-30).log2()).sum()) * codes.numel() / 8
    packed = pack_bits(codes, bits).reshape(200, -1)
    assert entropy_bound(packed) <= 1.001 * entropy + 1
    size = len(encode_tensor(packed, coder))
    assert size >= 0.98 * entropy_bound(packed)
    assert size <= (1.005 if coder == "range" else 1.15) * entropy + 200


def test_incompressible_bytes_grow_by_a_few_only(coder: str) -> None:
    tensor = torch.randint(0, 256, (10_000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert len(encode_tensor(tensor, coder)) <= 10_000 + 13


@pytest.mark.parametrize("name", ["float32", "bytes", "constant"])
def test_a_changed_byte_anywhere_is_noticed(name: str, coder: str) -> None:
    tensor = TENSORS[name]
    data = encode_tensor(tensor, coder)
    for place in range(0, len(data), max(1, len(data) // 60)):
        damaged = bytearray(data)
        damaged[place] ^= 0x11
        # A flipped bit of padding may leave every symbol as it was; then the tensor must be the same.
        try:
            again = decode_tensor(bytes(damaged), tensor.dtype, tensor.shape)
        except DamagedError:
            continue
        assert torch.equal(again, tensor), place


@pytest.mark.parametrize("cut", [0, 3, 4, 11, 20, -1])
def test_a_truncated_stream_is_noticed(cut: int, coder: str) -> None:
    data = encode_tensor(TENSORS["bytes"], coder)
    with pytest.raises(DamagedError):
        decode_tensor(data[:cut], torch.uint8, (33, 17))


def test_another_shape_is_noticed(coder: str) -> None:
    data = encode_tensor(TENSORS["bytes"], coder)
    with pytest.raises(DamagedError):
        decode_tensor(data, torch.uint8, (33, 18))
    with pytest.raises(DamagedError, match="left over"):
        decode_tensor(data + b"\0", torch.uint8, (33, 17))


def test_unknown_and_missing_coders_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="entropy_coding must be one of 'range', 'huffman', got 'zip'"):
        check_coder("zip")
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "constriction":
            raise ModuleNotFoundError(name="constriction")
        return original(name, *args, **kwargs)

    monkeypatch.setattr("weft.numerics.entropy_coding.importlib.import_module", lambda name: without(name))
    check_coder("huffman")
    with pytest.raises(ImportError, match=r"pip install 'weft\[entropy\]'"):
        encode_tensor(torch.zeros(3))
