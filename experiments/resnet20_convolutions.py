"""ResNet-20's convolutions by every family of chains: accuracy without training, at a share of the
parameters.

    python experiments/resnet20_convolutions.py            # all families, about 20 minutes on one core
    python experiments/resnet20_convolutions.py Tucker     # one family; its rows replace those in the file

All 3×3 convolutions but the first are compressed, calibrated on 1,000 unlabelled training images, and
evaluated on 5,000 test images; shares are those of the compressed layers' parameters. "uniform" gives every
layer the same share, "plan" lets `weft.allocate` share them out by the layers' error curves. Every row is
given with and without corrected batch-norm statistics. Writes experiments/results/resnet20_convolutions.json;
skips where the data folder is absent.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from data import shared_file
from rich.console import Console
from rich.table import Table
from torch import nn

import weft
from weft.bench import commit, surroundings
from weft.measure import accuracy
from weft.plan.error_curves import error_curves
from weft.schemes.corrections import correct_batch_norm
from weft.sources import load_data, load_model
from weft.storage import write_text
from weft.structures import family
from weft.structures.base import Shape, Structure
from weft.structures.dense import Dense
from weft.structures.tucker import Tucker

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "resnet20_convolutions.json"
FAMILIES = ("LowRank", "Separable", "Tucker", "CanonicalPolyadic", "TensorTrain")
SHARES = (0.75, 0.5, 0.35)
KEPT = ("conv1", "linear")
COLUMNS = ("plain", "plain, batch norm", "weighted", "weighted, batch norm", "plan", "plan, batch norm")


def largest(name: str, shape: Shape, numbers: int) -> Structure:
    """The largest member of a family with at most so many parameters."""

    def count(structure: Structure) -> int:
        found = structure.parameter_count(shape)
        assert found is not None
        return found

    if name == "Tucker":  # the same share of both channel modes
        steps = max(shape[:2])
        fitting = [
            Tucker(step / steps) for step in range(1, steps + 1) if count(Tucker(step / steps)) <= numbers
        ]
        return fitting[-1]
    kind, rank = family(name), 1
    while count(kind(rank + 1)) <= numbers:
        rank += 1
    return kind(rank)


def run(name: str, setting: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row per share."""
    model, calibration, held_out = setting["model"], setting["calibration"], setting["held_out"]
    plain, weighted = setting["plain"], setting["weighted"]
    whole = sum(layer.cost.parameters for layer in weighted.layers.values())
    started = time.perf_counter()
    curves = error_curves(weighted, [family(name)])
    curve_seconds = time.perf_counter() - started

    def measured(plan: Mapping[str, Structure], survey: weft.Survey) -> dict[str, float]:
        started = time.perf_counter()
        small, log = weft.compress(model, plan, survey)
        seconds = time.perf_counter() - started
        corrected: nn.Module = copy.deepcopy(small)
        correct_batch_norm(corrected, model, calibration)
        kept = sum(
            layer.cost.parameters
            for key, layer in survey.layers.items()
            if isinstance(plan.get(key, Dense()), Dense)
        )
        return {
            "accuracy": accuracy(small, held_out),
            "batch_norm": accuracy(corrected, held_out),
            "error": math.sqrt(sum(entry["error"] ** 2 for entry in log) / len(log)),
            "parameters": (kept + sum(entry["parameters"] for entry in log)) / whole,
            "multiply_adds": sum(entry["multiply_adds"] for entry in log),
            "fit_seconds": seconds,
        }

    for share in SHARES:
        uniform = {
            key: largest(name, layer.shape, int(share * layer.cost.parameters))
            for key, layer in weighted.layers.items()
        }
        budget = weft.Budget(parameters=weighted.total.parameters - whole + int(share * whole))
        shared_out = weft.allocate(weighted, [name], budget, curves=curves)
        row = {
            "family": name,
            "share": share,
            "plain": measured(uniform, plain),
            "weighted": measured(uniform, weighted),
            "plan": measured(shared_out, weighted),
            "curve_seconds": curve_seconds,
        }
        shown = "  ".join(f"{column} {value:.4f}" for column, value in zip(COLUMNS, cells(row), strict=True))
        print(f"{name} {share}: {shown}", flush=True)
        yield row


def cells(row: Mapping[str, Any]) -> list[float]:
    return [row[kind][key] for kind in ("plain", "weighted", "plan") for key in ("accuracy", "batch_norm")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", nargs="*", choices=[*FAMILIES, []])
    names = parser.parse_args().family or FAMILIES
    torch.manual_seed(0)
    try:
        model = load_model(f"{HERE / 'models.py'}:resnet20", shared_file("cifar10/resnet20.npz"))
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        sys.exit(0)
    data = load_data(f"{HERE / 'data.py'}:cifar10")
    calibration = list(data.inputs("calibration", limit=1000))
    held_out = list(data.batches("test", batch_size=250))
    surveys = {"plain": weft.survey(model), "weighted": weft.survey(model, calibration)}
    setting = {"model": model, "calibration": calibration, "held_out": held_out}
    for kind, survey in surveys.items():
        layers = {name: layer for name, layer in survey.layers.items() if name not in KEPT}
        setting[kind] = replace(survey, layers=layers)
    dense = accuracy(model, held_out)
    for name in names:
        rows = list(run(name, setting))
        record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"rows": []}
        others = [row for row in record["rows"] if row["family"] != name]
        stamp = {"commit": commit(), "seed": 0}
        ordered = sorted(
            others + [{**row, **stamp} for row in rows],
            key=lambda row: (FAMILIES.index(row["family"]), -row["share"]),
        )
        record = {
            "experiment": "resnet20_convolutions",
            "dense": dense,
            "calibration_samples": 1000,
            "command": "python experiments/resnet20_convolutions.py",
            "environment": surroundings(),
            "rows": ordered,
        }
        RESULTS.parent.mkdir(exist_ok=True)
        write_text(RESULTS, json.dumps(record, indent=1) + "\n")
    show(json.loads(RESULTS.read_text(encoding="utf-8")))


def show(record: Mapping[str, Any]) -> None:
    """Prints the table of a results file."""
    table = Table(title=f"ResNet-20: accuracy, dense {record['dense']:.4f}", title_justify="left")
    for heading in ("family", "share", *COLUMNS):
        table.add_column(heading, justify="left" if heading == "family" else "right")
    for row in record["rows"]:
        table.add_row(row["family"], f"{row['share']:g}", *(f"{value:.4f}" for value in cells(row)))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
