"""Supports: both forms, their size against the entropy, and damaged streams."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.numerics.supports import decode_support, encode_support, pack_bits, unpack_bits


@given(
    st.integers(1, 20),
    st.lists(st.integers(0, 2**20 - 1), max_size=50),
)
def test_packed_bits_unpack(bits: int, numbers: list[int]) -> None:
    codes = torch.tensor([number % (1 << bits) for number in numbers], dtype=torch.int64)
    stream = pack_bits(codes, bits)
    assert stream.dtype == torch.uint8
    assert len(stream) == math.ceil(len(codes) * bits / 8)
    assert torch.equal(unpack_bits(stream, bits)[: len(codes)], codes)


@given(st.integers(1, 3000), st.floats(0.0, 1.0), st.integers(0, 2**31))
def test_supports_decode(size: int, density: float, seed: int) -> None:
    mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < density**3
    places = decode_support(encode_support(mask), size, int(mask.sum()))
    assert torch.equal(places, mask.nonzero().squeeze(1))


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05, 0.1, 0.2, 0.4, 0.7])
def test_size_is_near_the_entropy_and_never_above_a_bitmap(density: float) -> None:
    mask = torch.rand(500, 600, generator=torch.Generator().manual_seed(0)) < density
    share = float(mask.double().mean())
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    size = 8 * len(encode_support(mask)) / mask.numel()
    assert size <= 1 + 16 / mask.numel()
    assert entropy <= size
    if density < 0.2:
        assert size <= 1.15 * entropy


def test_a_gap_of_millions_of_places_needs_no_filler_entries() -> None:
    mask = torch.zeros(3, 5_000_000, dtype=torch.bool)
    mask[0, 4_999_999] = mask[2, 70_000] = True
    stream = encode_support(mask)
    assert len(stream) <= 12
    assert decode_support(stream, mask.numel(), 2).tolist() == [4_999_999, 10_070_000]


@pytest.mark.parametrize(
    "damage",
    [
        lambda stream: stream[:0],
        lambda stream: stream[3:],
        lambda stream: torch.cat([stream, stream]),
        lambda stream: torch.cat([stream[:-1], stream.new_tensor([99])]),
        lambda stream: torch.cat([stream[:-1], stream[-1:] + 1]),
        lambda stream: stream.to(torch.int32),
    ],
)
def test_damaged_streams_are_refused(damage: object) -> None:
    mask = torch.rand(40, 50, generator=torch.Generator().manual_seed(1)) < 0.1
    with pytest.raises(ValueError, match="support must be"):
        decode_support(damage(encode_support(mask)), mask.numel(), int(mask.sum()))
