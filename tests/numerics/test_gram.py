"""Grams against float64 closed forms in NumPy."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.numerics.gram import BlockDiagonalGram, DenseGram, DiagonalGram, Gram, squared_error

KINDS = ("dense", "blocks", "diagonal")
each_kind = pytest.mark.parametrize("kind", KINDS)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram_of(
    kind: str, size: int, *, samples: int = 50, shrinkage: float = 0.1, seed: int = 0, groups: int = 3
) -> Gram:
    """A Gram of few or many random samples; few make it singular."""
    if kind == "diagonal":
        return DiagonalGram(drawn(samples, size, seed=seed).square().mean(0), shrinkage)
    x = drawn(groups if kind == "blocks" else 1, samples, size, seed=seed)
    moment = x.mT @ x / samples
    return BlockDiagonalGram(moment, shrinkage) if kind == "blocks" else DenseGram(moment[0], shrinkage)


def blocks_of(gram: Gram) -> list[np.ndarray]:
    """Ĝ per block of rows, from the raw moment by the definition."""
    moment = gram.moment.numpy()
    blocks = [np.diag(moment)] if moment.ndim == 1 else [moment] if moment.ndim == 2 else list(moment)
    return [block + gram.ridge * np.eye(gram.size) for block in blocks]


def rows_times(matrix: Tensor, blocks: list[np.ndarray]) -> np.ndarray:
    parts = np.split(matrix.numpy(), len(blocks))
    return np.concatenate([part @ block for part, block in zip(parts, blocks, strict=True)])


sizes = st.integers(1, 9)
shrinkages = st.sampled_from([0.0, 1e-3, 0.1, 2.0])


@given(st.sampled_from(KINDS), sizes, st.integers(1, 12), shrinkages, st.integers(1, 3))
@settings(deadline=None)
def test_matmul_and_norm_are_those_of_the_shrunk_moment(
    kind: str, size: int, samples: int, shrinkage: float, rows: int
) -> None:
    gram = gram_of(kind, size, samples=samples, shrinkage=shrinkage)
    matrix = drawn(3 * rows, size, seed=1)
    expected = rows_times(matrix, blocks_of(gram))
    np.testing.assert_allclose(gram.matmul(matrix).numpy(), expected, rtol=1e-12, atol=1e-12)
    assert float(gram.squared_norm(matrix)) == pytest.approx(np.sum(expected * matrix.numpy()), rel=1e-12)


@given(st.sampled_from(KINDS), sizes, st.integers(1, 12), shrinkages)
@settings(deadline=None)
def test_whitened_rows_have_the_metric_as_their_euclidean_one(
    kind: str, size: int, samples: int, shrinkage: float
) -> None:
    gram = gram_of(
        kind, size, samples=samples, shrinkage=shrinkage
    )  # singular where samples < size, shrinkage = 0
    matrix = drawn(3 * size, size, seed=1)
    white = gram.whiten(matrix).numpy()
    expected = rows_times(matrix, blocks_of(gram)) @ matrix.numpy().T
    parts = len(blocks_of(gram))
    for block in range(parts):
        part = slice(block * len(matrix) // parts, (block + 1) * len(matrix) // parts)
        scale = np.abs(expected[part, part]).max()
        np.testing.assert_allclose(white[part] @ white[part].T, expected[part, part], atol=1e-9 * scale)


@given(st.sampled_from(KINDS), sizes, st.floats(1e-3, 3.0))
@settings(deadline=None)
def test_unwhiten_undoes_whiten(kind: str, size: int, shrinkage: float) -> None:
    gram = gram_of(kind, size, samples=2, shrinkage=shrinkage)
    matrix = drawn(6, size, seed=1)
    torch.testing.assert_close(gram.unwhiten(gram.whiten(matrix)), matrix, rtol=1e-9, atol=1e-9)


@each_kind
def test_dense_and_root_belong_together(kind: str) -> None:
    gram = gram_of(kind, 6)
    expected = np.mean(blocks_of(gram), axis=0)
    np.testing.assert_allclose(gram.dense().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose((gram.root() @ gram.root().T).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(gram.diagonal().numpy(), expected.diagonal(), atol=1e-12)
    np.testing.assert_allclose(gram.average().dense().numpy(), expected, atol=1e-12)


@each_kind
def test_the_ridge_is_the_shrinkage_times_the_mean_diagonal(kind: str) -> None:
    raw = gram_of(kind, 5, shrinkage=0.0)
    gram = gram_of(kind, 5, shrinkage=0.3)
    assert raw.ridge == 0.0
    assert gram.ridge == pytest.approx(0.3 * float(raw.diagonal().mean()), rel=1e-12)


@each_kind
@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_a_layer_that_saw_no_signal_gets_the_frobenius_norm(kind: str, shrinkage: float) -> None:
    zero = {"dense": (4, 4), "blocks": (2, 4, 4), "diagonal": (4,)}[kind]
    make = {"dense": DenseGram, "blocks": BlockDiagonalGram, "diagonal": DiagonalGram}[kind]
    gram, matrix = make(torch.zeros(zero), shrinkage), drawn(6, 4)
    assert float(gram.squared_norm(matrix)) == pytest.approx(float(matrix.square().sum()))
    torch.testing.assert_close(gram.unwhiten(gram.whiten(matrix)), matrix)


@each_kind
def test_restriction_takes_rows_and_columns_and_keeps_the_ridge(kind: str) -> None:
    gram = gram_of(kind, 7)
    indices = torch.tensor([5, 0, 2])
    part = gram.restrict(indices)
    assert type(part) is type(gram)
    assert part.size == 3
    assert part.ridge == gram.ridge
    torch.testing.assert_close(part.dense(), gram.dense()[indices][:, indices])


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_come_in_the_callers_dtype(kind: str, dtype: torch.dtype) -> None:
    gram, matrix = gram_of(kind, 5), drawn(6, 5, seed=1)
    for method in (gram.matmul, gram.whiten, gram.unwhiten):
        got = method(matrix.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), method(matrix), rtol=1e-4, atol=1e-5)


@each_kind
def test_a_singular_gram_of_few_samples_stays_finite_both_ways(kind: str) -> None:
    gram = gram_of(kind, 12, samples=1, shrinkage=0.0)
    matrix = drawn(6, 12, seed=1)
    white = gram.whiten(matrix)
    assert torch.isfinite(white).all()
    assert torch.isfinite(gram.unwhiten(white)).all()


@each_kind
def test_copies_and_pickles_measure_alike(kind: str) -> None:
    gram, matrix = gram_of(kind, 5), drawn(6, 5, seed=1)
    before = gram.whiten(matrix)
    for again in (copy.deepcopy(gram), pickle.loads(pickle.dumps(gram))):
        assert torch.equal(again.whiten(matrix), before)
        assert again.digest() == gram.digest()


@each_kind
def test_a_normalized_gram_is_the_same_metric_in_another_unit(kind: str) -> None:
    gram, matrix = gram_of(kind, 5), drawn(6, 5, seed=1)
    whitened = gram.whiten(matrix)  # which keeps its roots
    unit = float(gram.diagonal().mean())
    found = gram.normalized()
    assert float(found.diagonal().mean()) == pytest.approx(1)
    torch.testing.assert_close(found.matmul(matrix), gram.matmul(matrix) / unit)
    torch.testing.assert_close(found.whiten(matrix), whitened / math.sqrt(unit))


@each_kind
def test_released_roots_are_found_again(kind: str) -> None:
    gram, matrix = gram_of(kind, 5), drawn(6, 5, seed=1)
    before, size = gram.whiten(matrix), len(pickle.dumps(vars(gram)))
    gram.release()
    assert len(pickle.dumps(vars(gram))) <= size - (kind != "diagonal") * 2 * gram.moment.nbytes
    assert torch.equal(gram.whiten(matrix), before)


@each_kind
def test_the_digest_tells_contents_apart(kind: str) -> None:
    digests = {
        gram_of(kind, 5).digest(),
        gram_of(kind, 5, seed=1).digest(),
        gram_of(kind, 5, shrinkage=0.2).digest(),
        gram_of(kind, 4).digest(),
    }
    assert len(digests) == 4
    assert gram_of(kind, 5).digest() == gram_of(kind, 5).digest()


def test_the_moment_is_kept_in_float64_and_not_shared_with_autograd() -> None:
    moment = torch.eye(3, requires_grad=True)
    gram = DenseGram(moment)
    assert gram.moment.dtype == torch.float64
    assert not gram.moment.requires_grad


@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.booleans())
@settings(deadline=None)
def test_squared_error_is_the_trace_of_the_definition(
    rows: int, columns: int, with_input: bool, with_output: bool
) -> None:
    error = drawn(rows, columns, seed=2)
    input_gram = gram_of("dense", columns) if with_input else None
    output_gram = gram_of("dense", rows, seed=5) if with_output else None
    left = blocks_of(output_gram)[0] if output_gram else np.eye(rows)
    right = blocks_of(input_gram)[0] if input_gram else np.eye(columns)
    expected = np.trace(left @ error.numpy() @ right @ error.numpy().T)
    assert float(squared_error(error, input_gram, output_gram)) == pytest.approx(expected, rel=1e-10)


def test_squared_error_under_blocks_measures_every_part_of_the_rows_by_its_own_block() -> None:
    gram, error = gram_of("blocks", 4), drawn(6, 4, seed=2)
    expected = sum(
        np.trace(part @ block @ part.T)
        for part, block in zip(np.split(error.numpy(), 3), blocks_of(gram), strict=True)
    )
    assert float(squared_error(error, gram)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (DenseGram, (3, 4), "moment must be a square matrix"),
        (DenseGram, (3,), "moment must be a square matrix"),
        (BlockDiagonalGram, (2, 3, 4), r"moment must be of shape \(groups, size, size\)"),
        (DiagonalGram, (3, 3), "moment must be a vector"),
    ],
)
def test_misshapen_moments_are_refused(make: type, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(torch.ones(shape))


@each_kind
def test_bad_values_are_refused(kind: str) -> None:
    make = type(gram_of(kind, 3))
    moment = gram_of(kind, 3).moment
    with pytest.raises(ValueError, match="shrinkage must be at least 0, got nan"):
        make(moment, math.nan)
    with pytest.raises(ValueError, match=r"shrinkage must be at least 0, got -0\.1"):
        make(moment, -0.1)
    moment.view(-1)[0] = math.nan
    with pytest.raises(ValueError, match="moment must be finite everywhere"):
        make(moment)
