"""Products with rows of codewords against float64, by both routes of the native code and every copy."""

import pytest
import torch
from torch import Tensor

from weft.kernels import codewords, dispatch
from weft.measure import threads

needs_native = pytest.mark.skipif(dispatch.native is None, reason="no native kernels here")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(
    outputs: int, subspaces: int, width: int, words: int, books: int = 1, *, scaled: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Codes, words, scales and the number of subspaces."""
    generator = torch.Generator().manual_seed(outputs + subspaces)
    codes = torch.randint(words, (outputs, subspaces), generator=generator)
    if words <= 16:
        wide = torch.nn.functional.pad(codes, (0, subspaces % 2))
        codes = wide[:, ::2] + 16 * wide[:, 1::2]
    scales = drawn(outputs, seed=1) if scaled else None
    return codes.to(torch.uint8), drawn(books, width, words), scales, subspaces


def composed(x: Tensor, bias: Tensor | None) -> Tensor:
    raise AssertionError("the native code was to run")


CASES = {
    "one piece": case(5, 1, 3, 4),
    "wide words": case(70, 6, 33, 256),
    "as published": case(40, 12, 8, 200, 12, scaled=False),
    "shared unevenly": case(33, 25, 2, 100, 3),
    "two to a byte": case(50, 26, 4, 16),
    "an odd number, two to a byte": case(50, 27, 2, 9, 2),
    "more than one block of tables": case(300, 60, 8, 256),
}


@needs_native
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 3, 70])
@pytest.mark.parametrize("copy", ["portable", "AVX2", "AVX-512", "NEON"])
def test_products_are_those_of_the_weight(name: str, batch: int, copy: str, request) -> None:
    codes, words, scales, subspaces = CASES[name]
    usual = dispatch.native.instructions()
    if not dispatch.native.use_instructions(copy):
        pytest.skip(f"{copy} instructions are not to be had here")
    request.addfinalizer(lambda: dispatch.native.use_instructions(usual))
    x, bias = drawn(batch, subspaces * words.shape[1], seed=2), drawn(len(codes), seed=3)
    wide = [None if tensor is None else tensor.double() for tensor in (words, scales)]
    expected = codewords.reference(x.double(), codes, *wide, bias.double(), subspaces)
    for count in (1, 2):
        with threads(count):
            got = codewords.codewords_apply(x, codes, words, scales, bias, subspaces, composed)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    plain = codewords.codewords_apply(x[None], codes, words, None, None, subspaces, composed)
    unscaled = codewords.reference(x.double(), codes, wide[0], None, None, subspaces)
    largest = float(unscaled.abs().max())
    torch.testing.assert_close(plain[0].double(), unscaled, rtol=1e-5, atol=1e-5 * largest)


@needs_native
@pytest.mark.parametrize("batch", [1, 70])
def test_codes_beyond_the_codebook_stay_inside_of_the_arrays(batch: int) -> None:
    """A damaged buffer gives wrong products, never another's memory (tools/sanitize.py runs this)."""
    codes, words, _, subspaces = case(40, 5, 4, 100)
    y = codewords.codewords_apply(
        drawn(batch, 20), torch.full_like(codes, 255), words, None, None, subspaces, composed
    )
    assert y.isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        lambda x, codes, words: (x[:, :-1], codes, words),
        lambda x, codes, words: (x, codes[:, :-1], words),
        lambda x, codes, words: (x, codes.int(), words),
        lambda x, codes, words: (x, codes, words[0]),
        lambda x, codes, words: (x.double(), codes, words),
        lambda x, codes, words: (x, codes.T.contiguous().T, words),
    ],
)
def test_what_does_not_fit_is_left_to_the_composition(change) -> None:
    codes, words, scales, subspaces = case(40, 5, 4, 100)
    seen = []

    def noted(x: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(x.shape)
        return x

    codewords.codewords_apply(*change(drawn(3, 20), codes, words), scales, None, subspaces, noted)
    assert len(seen) == 1


def test_the_operation_passes_torchs_own_check() -> None:
    codes, words, scales, subspaces = case(6, 4, 3, 20)
    arguments = (drawn(2, 12), codes, words, scales, drawn(6), subspaces)
    torch.library.opcheck(torch.ops.weft.codewords_apply.default, arguments)
