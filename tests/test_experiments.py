"""The papers' experiments: records go on after an interruption, tables follow from the results on disk."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import weft
from weft.structures.hierarchical import Hierarchical
from weft.structures.low_rank import LowRank
from weft.structures.sparse_product import SparseProduct
from weft.structures.tensor_train import TensorTrain

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Imports an experiment as its script does; its results go to a folder of their own."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def records(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module of records, with results in a temporary folder."""
    module = script("records")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_a_row_is_computed_once_and_found_by_the_next_run(records):
    calls = []

    def compute() -> dict[str, float]:
        calls.append(1)
        return {"value": 0.5}

    first = records.Records("paper").row("table", {"rank": 3, "shape": (2, 4)}, compute, seed=1)
    again = records.Records("paper").row("table", {"rank": 3, "shape": (2, 4)}, compute, seed=1)
    assert first == again
    assert len(calls) == 1
    records.Records("paper").row("table", {"rank": 3, "shape": (2, 4)}, compute, seed=2)
    records.Records("paper", fresh=True).row("table", {"rank": 3, "shape": (2, 4)}, compute, seed=1)
    assert len(calls) == 3


def test_an_interrupted_run_keeps_its_finished_rows(records, tmp_path):
    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    run = records.Records("paper")
    run.row("table", {"rank": 1}, lambda: {"value": 1})
    with pytest.raises(KeyboardInterrupt):
        run.row("table", {"rank": 2}, interrupted)
    kept = json.loads((tmp_path / "paper.json").read_text())
    assert [row["value"] for row in kept["rows"]] == [1]
    assert kept["command"] == "python experiments/paper.py"
    assert {"seed", "commit", "seconds_taken"} <= kept["rows"][0].keys()
    assert {"processor", "torch", "weft"} <= kept["environment"].keys()


def test_the_reduced_form_has_a_file_of_its_own(records, tmp_path):
    records.Records("paper", quick=True).row("table", {}, lambda: {"value": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["paper_quick.json"]
    assert records.Records("paper").rows == []


@pytest.mark.parametrize("quick", [False, True], ids=["whole", "reduced"])
def test_the_tables_of_the_committed_results_have_a_cell_per_heading(script, quick):
    kept = script("records").Records
    tables = 0
    for name, (_, sheets) in script("papers").PAPERS.items():
        results = kept(name, quick=quick)
        for sheet in sheets(results) if results.rows else ():
            tables += 1
            for cells in sheet.rows:
                assert len(cells) == len(sheet.headings), sheet.title
                assert all(isinstance(cell, str) for cell in cells), sheet.title
    assert tables


@pytest.mark.parametrize("make", [LowRank, lambda rank: Hierarchical(rank, leaf_size=8)])
@pytest.mark.parametrize("budget", [100, 700, 1900])
def test_the_largest_member_fits_and_the_next_does_not(script, make, budget):
    layer = weft.survey(nn.Linear(64, 48)).layers[""]
    found = script("kissel_diepold").largest(make, layer, budget)
    if not found:
        assert make(1).parameter_count(layer.shape) > budget
        return
    (structure,) = found
    assert structure.parameter_count(layer.shape) <= budget
    beyond = make(structure.rank + 1)
    assert structure.rank == 48 or beyond.parameter_count(layer.shape) > budget


def test_every_family_keeps_to_its_share(script):
    module = script("kissel_diepold")
    torch.manual_seed(0)
    layer = weft.survey(nn.Linear(64, 48), [torch.randn(200, 64)]).layers[""]
    budget = layer.weight.numel() // 4
    for name, members in module.FAMILIES.items():
        found = list(members(layer, budget))
        assert found, name
        for structure in found:
            count = structure.fit(layer.weight, input_gram=layer.input_gram).parameter_count()
            assert 0.5 * budget < count <= budget, str(structure)


def test_numbers_between_cores_are_those_of_the_contraction(script):
    structure, shape = TensorTrain(50), (1024, 1024)
    cores = [torch.randn(core) for core in structure.core_shapes(shape)]
    state = torch.randn(1, *(core.shape[2] for core in cores), 1)  # (outputs so far, inputs left, rank)
    sizes = []
    for core in reversed(cores):
        state = torch.einsum("o...nr,amnr->om...a", state, core).flatten(0, 1)
        sizes.append(state.numel())
    assert sizes[-1] == 1024
    assert script("giffon").hidden(structure, shape) == max(sizes[:-1])
    assert script("giffon").hidden(SparseProduct(3, 2), (10, 500)) == 10
    assert script("giffon").hidden(LowRank(3), (10, 500)) == 0


@pytest.mark.parametrize("shape", [(16, 16, 3, 3), (10, 500), (500, 800)])
def test_products_asked_for_are_smaller_than_their_layer(script, shape):
    for factors, sparsity in script("giffon").SIZES:
        structure = script("giffon").sparse_product(shape, factors, sparsity, "random")
        assert structure.sparsity <= sparsity
        structure.check(shape)
        count = structure.parameter_count(shape)
        assert count <= torch.Size(shape).numel() // 2 or structure.sparsity == 1
