"""Rows in parts by importance, each part with its own structure."""

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.structures.base import DenseGram, DiagonalGram, relative_error
from weft.structures.divided_rows import DividedRows
from weft.structures.low_rank import LowRank
from weft.structures.quantized import Quantized
from weft.structures.sparse_product import SparseProduct


def table(rows: int = 200, width: int = 32) -> tuple[Tensor, DiagonalGram]:
    """A table of which a few rows are looked up nearly always."""
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.arange(1, rows + 1).double() ** -1.5
    shuffled = frequencies[torch.randperm(rows, generator=generator)]
    return torch.randn(rows, width, generator=generator), DiagonalGram(shuffled / shuffled.sum(), 0.01)


def test_the_rows_that_count_are_in_the_first_part() -> None:
    weight, output_gram = table()
    structure = DividedRows((Quantized(8), Quantized(2, zero="between")), (0.1,))
    member = structure.fit(weight, output_gram=output_gram)
    lost = (weight - member.to_dense().detach()).norm(dim=1) / weight.norm(dim=1)
    fine = output_gram.diagonal() * weight.double().square().sum(1)
    first = fine.argsort(descending=True)[:20]
    assert float(lost[first].detach().max()) < 0.02
    rest = torch.ones(200, dtype=torch.bool)
    rest[first] = False
    assert float(lost[rest].min()) > 0.1


def test_a_division_beats_every_single_size_of_no_fewer_bytes() -> None:
    weight, output_gram = table(2000, 64)
    grams = {"output_gram": output_gram}
    inner = tuple(Quantized(bits) for bits in (3, 4, 5, 6, 8))
    curve = DividedRows.error_curve(weight, inner=inner, **grams)
    single = Quantized(5).fit(weight, **grams)
    error = relative_error(weight, single.to_dense(), **grams)
    best = min(
        (point for point in curve if point.cost.bytes <= single.cost().bytes), key=lambda one: one.error
    )
    assert best.error < 0.5 * error
    fitted = best.structure.fit(weight, **grams)
    assert fitted.cost() == best.cost
    assert relative_error(weight, fitted.to_dense(), **grams) == pytest.approx(best.error, rel=0.05)


def test_candidates_are_sizes_of_families_that_fit_rows_apart() -> None:
    inner = (
        LowRank(4),
        Quantized(3),
        Quantized(6),
        Quantized(4, of=LowRank(4)),
        Quantized(4, codebook="kmeans"),
    )
    found = list(DividedRows.candidates((100, 64), inner))
    assert {structure.parts for structure in found} == {(Quantized(6), Quantized(3))}
    assert not list(DividedRows.candidates((20, 64), inner))
    assert DividedRows.error_curve(torch.randn(100, 64), inner=(LowRank(4),)) == []


def test_a_later_part_takes_up_what_the_first_one_lost() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 16, generator=generator, dtype=torch.float64)
    mixing = torch.randn(64, 8, generator=generator, dtype=torch.float64)
    grams = {"output_gram": DenseGram(mixing @ mixing.T + 0.1 * torch.eye(64), 0.0)}
    structure = DividedRows((LowRank(2), LowRank(14)), (0.5,))
    together = structure.fit(weight, **grams).to_dense()
    diagonal = DiagonalGram(grams["output_gram"].diagonal(), 0.0)
    apart = structure.fit(weight, output_gram=diagonal).to_dense()
    assert relative_error(weight, together, **grams) < 0.7 * relative_error(weight, apart, **grams)


def test_an_embedding_finds_its_rows_in_their_parts() -> None:
    model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 4))
    indices = torch.randint(100, (20, 7))
    structure = DividedRows((Quantized(8), Quantized(4)), (0.2,))
    small, _ = weft.compress(model, {"0": structure}, weft.survey(model, [indices]))
    with torch.no_grad():
        dense = small[0].matrix.to_dense()
        torch.testing.assert_close(small[0](indices), dense[indices])


@pytest.mark.parametrize(
    ("parts", "shares", "message"),
    [
        ((), (), "not empty"),
        ((LowRank(1), LowRank(2)), (), "one for every part but the last"),
        ((LowRank(1), LowRank(2)), (1.0,), "sum below 1"),
        ((LowRank(1), LowRank(2)), (0.0,), "shares"),
    ],
)
def test_impossible_divisions_are_refused(
    parts: tuple[LowRank, ...], shares: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DividedRows(parts, shares)


def test_parts_are_structures_and_no_more_than_rows() -> None:
    with pytest.raises(TypeError, match="structures"):
        DividedRows((3,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most 1"):
        DividedRows((LowRank(1), LowRank(1)), (0.5,)).fit(torch.randn(1, 4))
    assert DividedRows((SparseProduct(1, 2), LowRank(1)), (0.5,)).parameter_count((8, 4)) is None


def test_labels_of_another_division_are_refused() -> None:
    structure = DividedRows((LowRank(1), LowRank(2)), (0.25,))
    tensors = structure.fit(torch.randn(16, 8)).stored()
    tensors["labels"] = torch.zeros_like(tensors["labels"])
    with pytest.raises(ValueError, match="parts of"):
        structure.from_tensors((16, 8), tensors)
