"""The registry: the folder's families, and a family of another package that nothing in weft knows by name."""

import importlib.metadata
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import pytest
import torch
from torch import Tensor, nn

import weft
from weft import checks
from weft.structures import families, from_json, select
from weft.structures.base import Geometry, Gram, Shape, Structure, StructuredMatrix, matrix_shape


@dataclass(frozen=True)
class Diagonal(Structure):
    """Rectangular matrices with one diagonal, as another package would write the family."""

    source: ClassVar[str] = "this test"

    @classmethod
    def candidates(cls, shape: Shape, inner: Iterable[Structure] = ()) -> Iterator[Self]:
        yield cls()

    def parameter_count(self, shape: Shape) -> int:
        return min(matrix_shape(shape))

    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int:
        positions = 1 if geometry is None else geometry.positions(shape[2:])
        return self.parameter_count(shape) * positions

    def _fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None,
        output_gram: Gram | None,
        start: StructuredMatrix | None,
        generator: torch.Generator | None,
    ) -> "DiagonalMatrix":
        return DiagonalMatrix(self, tuple(weight.shape), weight.flatten(1).diagonal().clone())

    def initialise(
        self, shape: Shape, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> "DiagonalMatrix":
        values = torch.randn(self.parameter_count(shape), dtype=dtype, generator=generator)
        return DiagonalMatrix(self, shape, values)

    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> "DiagonalMatrix":
        checks.tensor_names(tensors.keys(), ["values"], str(self))
        return DiagonalMatrix(self, shape, tensors["values"])


class DiagonalMatrix(StructuredMatrix):
    """A member of `Diagonal`."""

    def __init__(self, structure: Diagonal, shape: Shape, values: Tensor) -> None:
        super().__init__(structure, shape)
        self.values = nn.Parameter(values)

    def forward(self, x: Tensor) -> Tensor:
        count = len(self.values)
        return nn.functional.pad(x[..., :count] * self.values, (0, self.outputs - count))

    def to_dense(self) -> Tensor:
        dense = torch.zeros(self.outputs, self.inputs, dtype=self.values.dtype)
        dense.diagonal().copy_(self.values)
        return dense.reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        return self.to_dense().flatten(1)[indices]

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        positions = 1 if geometry is None else geometry.positions(self.shape[2:])
        return len(self.values) * positions


def install(monkeypatch: pytest.MonkeyPatch, *entries: str) -> None:
    """As if packages with these entry points were installed."""
    found = importlib.metadata.entry_points
    own = [importlib.metadata.EntryPoint("family", entry, "weft.structures") for entry in entries]

    def entry_points(**wanted: str) -> object:
        return own if wanted == {"group": "weft.structures"} else found(**wanted)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    families.cache_clear()


@pytest.fixture(autouse=True)
def fresh_registry() -> Iterator[None]:
    yield
    families.cache_clear()


def test_a_family_of_another_package_goes_the_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, f"{__name__}:Diagonal")
    assert families()["Diagonal"] is Diagonal
    assert from_json({"family": "Diagonal"}) == Diagonal()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.linspace(1, 2, 16)))
    survey = weft.survey(model, [torch.randn(64, 16)])
    plan = weft.allocate(survey, "Diagonal,LowRank", weft.Budget(parameters=0.5))
    assert plan["0"] == Diagonal()
    assert plan.expected["0"].error < 1e-6
    plan.save(tmp_path / "plan.json")
    small, _ = weft.compress(model, weft.Plan.load(tmp_path / "plan.json"), survey)
    weft.save(small, tmp_path / "small.safetensors")
    again = weft.load(tmp_path / "small.safetensors", model=model)
    x = torch.randn(5, 16)
    assert torch.equal(again(x), small(x))
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)
    tuned, log = weft.fine_tune(small, [x] * 2, teacher=model)
    assert len(log) == 2
    assert math.isfinite(float(tuned(x).detach().sum()))


def test_what_is_no_family_or_not_unique_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, f"{__name__}:Diagonal", f"{__name__}:Diagonal")
    with pytest.raises(ValueError, match="family names must be unique, got Diagonal twice"):
        families()
    install(monkeypatch, "pathlib:Path")
    with pytest.raises(TypeError, match="entry point family must be a Structure"):
        families()


def test_families_are_selected_by_name_or_class() -> None:
    assert select("LowRank, Dense") == [families()["LowRank"], families()["Dense"]]
    assert select([families()["Dense"], "Dense"]) == [families()["Dense"]]
    assert select("all") == list(families().values())
    with pytest.raises(ValueError, match="family must be one of .*LowRank.*, got 'Low'"):
        select("Low")
    with pytest.raises(ValueError, match="families must be named"):
        select([])
