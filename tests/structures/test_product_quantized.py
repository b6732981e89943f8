"""Product quantisation: storage, tables, bad input, training."""

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.kernels import dispatch
from weft.numerics.gram import DenseGram
from weft.structures.base import relative_error
from weft.structures.product_quantized import ProductQuantized, _pack, _unpack


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("codewords", "bits"), [(2, 4), (16, 4), (17, 8), (256, 8), (257, 16), (1000, 16)])
@pytest.mark.parametrize("subspaces", [1, 2, 5, 8])
def test_codes_are_packed_into_the_smallest_integers(codewords: int, bits: int, subspaces: int) -> None:
    codes = torch.randint(codewords, (7, subspaces), generator=torch.Generator().manual_seed(0))
    packed = _pack(codes, codewords)
    assert packed.dtype == torch.uint8
    assert packed[0].nbytes == (bits * subspaces + 7) // 8
    assert torch.equal(_unpack(packed, subspaces, codewords), codes)


def test_bytes_are_those_of_codes_codebooks_and_scales() -> None:
    member = ProductQuantized(16, 256).fit(drawn(100, 64))
    assert member.cost().bytes == 100 * 16 + 4 * (256 * 4) + 4 * 100
    assert member.cost().parameters == 100 * 64 + 256 * 4 + 100
    assert member.cost().multiply_adds == 100 * 64  # of the decoded weight, which runs


def test_as_many_codewords_as_rows_store_the_weight_itself() -> None:
    weight = drawn(6, 8)
    member = ProductQuantized(4, 6, codebooks=4, scaled=False).fit(weight)
    torch.testing.assert_close(member.to_dense(), weight, rtol=1e-5, atol=1e-6)


def test_the_product_is_that_of_the_published_table() -> None:
    """y_i = scale_i Σ_s table[s, code(i, s)], the table being every codeword times every piece of x."""
    member, x = ProductQuantized(16, 8).fit(drawn(100, 64)), drawn(5, 64, seed=1)
    found = member.as_codes(x)
    table = x.reshape(5, 16, 4) @ found.codebooks[0].T
    sums = torch.stack([table[:, torch.arange(16), code].sum(1) for code in found.codes], dim=1)
    torch.testing.assert_close(member(x), sums * found.scales, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("codewords", "kept"), [(8, 8 * 4), (257, 300 * 64)])
def test_what_is_kept_in_evaluation_is_made_again_after_a_change(codewords: int, kept: int) -> None:
    """The codebooks, where the product is native; the weight where a code takes two bytes."""
    if codewords <= 256 and dispatch.native is None:
        pytest.skip("no native kernels here")
    member, x = ProductQuantized(16, codewords).fit(drawn(300, 64)).eval(), drawn(5, 64, seed=1)
    with torch.no_grad():
        first = member(x)
        assert member.derived_bytes() >= 4 * kept
        assert (member.derived_bytes() >= 4 * 300 * 64) == (codewords > 256)
        member.codebooks *= 2
        torch.testing.assert_close(member(x), 2 * first)


def test_two_byte_codes_apply() -> None:
    weight, x = drawn(300, 6), drawn(5, 6, seed=1)
    member = ProductQuantized(3, 300, scaled=False).fit(weight)
    assert member.codes.shape == (300, 3, 2)
    assert int(member.as_codes(weight).codes.max()) > 255
    torch.testing.assert_close(member(x), x @ member.to_dense().T, rtol=1e-4, atol=1e-4)


def test_a_shared_codebook_serves_better_than_separate_ones_of_the_same_bytes() -> None:
    weight = drawn(64, 64)
    shared = ProductQuantized(32, 128).fit(weight)
    separate = ProductQuantized(32, 4, codebooks=32).fit(weight)
    assert separate.cost().parameters == shared.cost().parameters
    assert relative_error(weight, shared.to_dense()) < relative_error(weight, separate.to_dense())


def test_the_weighted_fit_halves_the_error_where_inputs_are_correlated() -> None:
    weight, mixing = drawn(60, 48), drawn(6, 48, seed=2)
    x = drawn(500, 6, seed=3) @ mixing + 0.1 * drawn(500, 48, seed=4)
    gram = DenseGram(x.T @ x / 500)
    structure = ProductQuantized(24, 8)
    errors = [
        relative_error(weight, structure.fit(weight, **grams).to_dense(), input_gram=gram)
        for grams in ({}, {"input_gram": gram})
    ]
    assert errors[1] < 0.5 * errors[0]


def test_a_layer_is_saved_and_loaded_bitwise(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))
    small, _ = weft.compress(model, {"0": ProductQuantized(8, 16), "2": ProductQuantized(12, 5, codebooks=3)})
    again = weft.load(weft.save(small, tmp_path / "small.safetensors"), model=model)
    x = drawn(3, 32)
    assert torch.equal(again(x), small(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subspaces": 0, "codewords": 4}, "subspaces must be at least 1, got 0"),
        ({"subspaces": 4, "codewords": 0}, "codewords must be between 1 and 65536, got 0"),
        ({"subspaces": 4, "codewords": 65537}, "codewords must be between 1 and 65536, got 65537"),
        (
            {"subspaces": 4, "codewords": 4, "codebooks": 5},
            "codebooks must be between 1 and 4 for 4 subspaces",
        ),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProductQuantized(**arguments)


def test_sizes_that_do_not_fit_the_weight_are_refused() -> None:
    with pytest.raises(
        ValueError, match="subspaces must be a divisor of 8, the inputs of .* got 3; use e.g. 2"
    ):
        ProductQuantized(3, 2).fit(drawn(4, 8))
    with pytest.raises(ValueError, match="codewords must be between 1 and 8 for a"):
        ProductQuantized(2, 9).fit(drawn(4, 8))
    with pytest.raises(TypeError, match="scaled must be True or False, got 1"):
        ProductQuantized(2, 9, scaled=1)


def test_codes_beyond_the_codebook_are_refused() -> None:
    structure = ProductQuantized(4, 5)
    stored = structure.fit(drawn(6, 8)).stored()
    stored["codes"] = torch.full_like(stored["codes"], 0x77)
    with pytest.raises(ValueError, match="codes must be below 5, got 7"):
        structure.from_tensors((6, 8), stored)


def test_the_codebook_trains() -> None:
    member = ProductQuantized(8, 8).fit(drawn(40, 16))
    target, x = drawn(40, 16, seed=5), drawn(256, 16, seed=6)
    optimiser = torch.optim.Adam(member.parameters(), 1e-2)
    losses = []
    for _ in range(50):
        loss = (member(x) - x @ target.T).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
