"""Pruned: patterns, storage, fits and export, beyond the contract's laws."""

import math
from pathlib import Path

import pytest
import torch
from tests.test_structure_contract import random_gram, random_weight
from torch import nn

import weft
from weft.export.onnx import check_onnx, export_onnx
from weft.export.torch_export import export_torch
from weft.structures.base import DenseGram, relative_error
from weft.structures.dense import Dense
from weft.structures.hierarchical import Hierarchical
from weft.structures.low_rank import LowRank
from weft.structures.pruned import Pruned, PrunedChain

PATTERNS = {
    "unstructured": 0.25,
    "rows": 0.25,
    "columns": 0.25,
    "2:4": 0.5,
    "1:8": 0.125,
    "4x4": 0.25,
    "8x3": 0.25,
}
SHAPE = (40, 48)


@pytest.mark.parametrize(("pattern", "density"), PATTERNS.items())
@pytest.mark.parametrize("score", ["magnitude", "input", "search"])
def test_every_pattern_applies_looks_up_and_comes_back(pattern: str, density: float, score: str) -> None:
    structure = Pruned(density, pattern=pattern, score=score)
    weight = random_weight(SHAPE, torch.float64)
    member = structure.fit(weight, input_gram=random_gram(48))
    dense = member.to_dense()
    assert int((dense != 0).sum()) == round(density * 40 * 48) == structure.parameter_count(SHAPE)
    x, y = torch.randn(5, 48, dtype=torch.float64), torch.randn(2, 3, 40, dtype=torch.float64)
    torch.testing.assert_close(member(x), x @ dense.T)
    torch.testing.assert_close(member.apply_transposed(y), y @ dense)
    indices = torch.tensor([[0, 39, 7], [1, 2, 3]])
    torch.testing.assert_close(member.rows(indices), dense[indices])
    assert torch.equal(member.mask(), structure.from_tensors(SHAPE, member.stored()).mask())
    covered = torch.zeros(SHAPE, dtype=torch.bool)
    for block in member.picture():
        if block.kind != "zero":
            covered[block.row : block.row + block.rows, block.column : block.column + block.columns] = True
    assert bool(covered[dense != 0].all())


def test_stored_bytes_are_values_and_the_shortest_support() -> None:
    shape = (200, 300)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    per_entry = {0.05: 6.6, 0.1: 5.5, 0.4: 2.6, 1.0: 1.01}  # bits
    for density, bits in per_entry.items():
        member = Pruned(density).fit(weight)
        kept = round(density * 60000)
        assert member.values.shape == (kept,)
        assert 8 * member.support.numel() <= bits * kept + 8
        assert member.cost().bytes == 4 * kept + member.support.numel()
    halves = Pruned(0.5, pattern="2:4").fit(weight)
    assert halves.cost().bytes == 200 * 150 * 4 + 200 * 150 * 2 // 8
    assert Pruned(0.25, pattern="rows").fit(weight).cost().bytes <= 50 * 300 * 4 + 26


def test_more_columns_than_16_bits_can_name() -> None:
    weight = torch.zeros(2, 70_001)
    weight[0, 70_000] = weight[1, 3] = 2.0
    member = Pruned(2 / 140_002).fit(weight)
    assert torch.equal(member.to_dense(), weight)
    assert torch.equal(member(torch.ones(1, 70_001)), torch.tensor([[2.0, 2.0]]))


def test_the_search_beats_pruning_and_solving_at_the_same_density() -> None:
    weight, gram = random_weight((64, 80)), random_gram(80)
    errors = {
        score: relative_error(
            weight, Pruned(0.1, score=score).fit(weight, input_gram=gram).to_dense(), input_gram=gram
        )
        for score in ("magnitude", "input", "search")
    }
    plain = Pruned(0.1, reconstruct=False).fit(weight, input_gram=gram)
    assert errors["magnitude"] < relative_error(weight, plain.to_dense(), input_gram=gram)
    assert errors["search"] < 0.95 * min(errors["magnitude"], errors["input"])


def test_whole_columns_are_solved_for_exactly() -> None:
    weight, gram = random_weight((10, 12), torch.float64), random_gram(12)
    member = Pruned(0.5, pattern="columns", score="search").fit(weight, input_gram=gram)
    kept = member.mask()[0]
    metric = gram.dense()
    expected = weight @ metric[:, kept] @ torch.linalg.inv(metric[kept][:, kept])
    torch.testing.assert_close(member.to_dense()[:, kept], expected, rtol=1e-8, atol=1e-8)


def test_sparse_low_rank_prunes_both_factors_and_loses_less_than_factors_pruned_alone() -> None:
    weight, gram = random_weight(SHAPE, torch.float64), random_gram(48)
    structure = Pruned(0.5, of=LowRank(10), score="search")
    member = structure.fit(weight, input_gram=gram)
    assert isinstance(member, PrunedChain)
    assert set(member.stored()) == {
        "of.left.values",
        "of.left.support",
        "of.right.values",
        "of.right.support",
    }
    assert member.cost().parameters == structure.parameter_count(SHAPE) == 0.5 * 10 * (40 + 48)
    alone = Pruned(0.5, of=LowRank(10), reconstruct=False).fit(weight, input_gram=gram)
    error = relative_error(weight, member.to_dense(), input_gram=gram)
    assert error < 0.9 * relative_error(weight, alone.to_dense(), input_gram=gram)


def test_filters_of_a_convolution_run_as_a_smaller_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(3, 8, 3, padding=1)
    small, _ = weft.compress(nn.Sequential(layer), {"0": Pruned(0.25, pattern="rows")})
    monkeypatch.setattr(torch.nn.functional, "unfold", lambda *_: pytest.fail("the patches were unfolded"))
    x = torch.randn(2, 3, 5, 5)
    expected = torch.nn.functional.conv2d(x, small[0].matrix.to_dense(), small[0].bias, padding=1)
    torch.testing.assert_close(small(x), expected)


@pytest.mark.parametrize("pattern", ["unstructured", "rows", "columns", "2:4", "4x4"])
def test_exports_to_onnx_and_torch_export_with_any_batch_size(pattern: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8))
    structure = Pruned(0.5, pattern=pattern)
    chain = Pruned(0.5, of=LowRank(4))
    small, _ = weft.compress(model, {"0": structure, "2": chain})
    sample = torch.randn(3, 16)
    assert check_onnx(export_onnx(small, sample, tmp_path / "a.onnx"), small, sample) < 1e-4
    program = torch.export.load(export_torch(small, sample, tmp_path / "a.pt2")).module()
    x = torch.randn(7, 16)
    torch.testing.assert_close(program(x), small(x))


def test_onnx_files_hold_the_kept_values_and_not_the_dense_weight(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    small, _ = weft.compress(nn.Sequential(nn.Linear(64, 50)), {"0": Pruned(0.1)})
    path = export_onnx(small, torch.randn(2, 64), tmp_path / "a.onnx")
    sizes = [math.prod(tensor.dims) for tensor in onnx.load(path).graph.initializer]
    assert 320 in sizes
    assert max(sizes) < 64 * 50


def test_training_moves_the_values_and_keeps_the_support() -> None:
    small, _ = weft.compress(nn.Sequential(nn.Linear(16, 12)), {"0": Pruned(0.25)})
    mask = small[0].matrix.mask()
    optimiser = torch.optim.SGD(small.parameters(), 0.1)
    before = small[0].matrix.to_dense().detach().clone()
    small(torch.randn(8, 16)).square().sum().backward()
    optimiser.step()
    after = small[0].matrix.to_dense()
    assert bool((after[~mask] == 0).all())
    assert bool((after[mask] != before[mask]).any())


def test_a_zero_weight_and_data_without_a_signal_fit() -> None:
    member = Pruned(0.2, score="search").fit(
        torch.zeros(6, 8), input_gram=DenseGram(torch.zeros(8, 8)), output_gram=random_gram(6)
    )
    assert bool((member.to_dense() == 0).all())
    assert bool((Pruned(0.5, of=LowRank(3)).fit(torch.zeros(6, 8)).to_dense() == 0).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0}, "density must be a share above 0 and at most 1, got 0"),
        ({"density": 1.5}, "density must be a share above 0 and at most 1, got 1.5"),
        ({"density": float("nan")}, "density must be a share"),
        ({"density": 0.5, "score": "size"}, "score must be one of 'magnitude', 'input', 'search'"),
        ({"density": 0.5, "pattern": "4"}, "pattern must be 'unstructured', 'rows', 'columns', 'n:m'"),
        ({"density": 0.5, "pattern": "0x4"}, "pattern must be"),
        ({"density": 0.5, "pattern": "5:4"}, "pattern must be"),
        ({"density": 0.3, "pattern": "2:4"}, "density must be 0.5 for the pattern 2:4, got 0.3"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pruned(**arguments)


@pytest.mark.parametrize("pattern", ["2:4", "4x2", "3x5"])
def test_a_block_that_does_not_divide_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"pattern must be of a size that divides .* \(6, 7\)"):
        Pruned(0.5, pattern=pattern).fit(torch.randn(6, 7))


def test_a_family_that_is_no_product_is_refused() -> None:
    structure = Pruned(0.5, of=Hierarchical(rank=2, leaf_size=8))
    with pytest.raises(ValueError, match="of must be a family whose members are products of matrices"):
        structure.fit(torch.randn(32, 32))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_damaged_support_is_refused(pattern: str) -> None:
    member = Pruned(0.5, pattern=pattern).fit(random_weight((8, 16)))
    tensors = member.stored()
    with pytest.raises(ValueError, match="support must be"):
        member.structure.from_tensors((8, 16), {**tensors, "support": torch.zeros_like(tensors["support"])})


def test_candidates_prune_the_factors_of_products_among_the_inner_ones() -> None:
    inner = [Dense(), LowRank(4), Hierarchical(rank=2)]
    candidates = list(Pruned.candidates((40, 48), inner))
    assert {type(candidate.of) for candidate in candidates} == {Dense, LowRank}
    curve = Pruned.error_curve(random_weight((40, 48)), inner=[LowRank(4)])
    assert any(point.structure.of == LowRank(4) for point in curve)
