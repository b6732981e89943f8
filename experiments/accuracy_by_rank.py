"""Accuracy by rank, plain and with the input Gram of unlabelled calibration images.

    python experiments/accuracy_by_rank.py mnist
    python experiments/accuracy_by_rank.py resnet20
    python experiments/accuracy_by_rank.py mobilenet_v2

Prints one table and writes experiments/results/accuracy_by_rank_NAME.json. Skips with a message where the
data folder (../shared/data, or WEFT_DATA) is absent.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from data import shared_file
from rich.console import Console
from rich.table import Table
from torch import nn

import weft
from weft.bench import surroundings
from weft.measure import accuracy
from weft.sources import load_data, load_model
from weft.storage import write_text
from weft.structures.base import matrix_shape
from weft.structures.low_rank import LowRank

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Experiment:
    """One network, its data, and the sizes to try.

    Attributes:
        model: the model source's function in experiments/models.py.
        weights: a file of the data folder; empty where the source brings its own.
        data: the data source's function in experiments/data.py.
        samples: calibration images, without labels.
        sizes: ranks, or shares of each layer's parameters where below 1.
        keep: layers that stay dense.
    """

    model: str
    weights: str
    data: str
    samples: int
    sizes: tuple[float, ...]
    keep: tuple[str, ...] = ()


EXPERIMENTS = {
    "mnist": Experiment(
        "mnist_network", "mnist/mlp_784_128_32_10.npz", "mnist", 4096, (2, 4, 8, 12, 16, 24), keep=("2",)
    ),
    "resnet20": Experiment(
        "resnet20", "cifar10/resnet20.npz", "cifar10", 1000, (0.35, 0.5, 0.75), keep=("conv1", "linear")
    ),
    "mobilenet_v2": Experiment(
        "mobilenet_v2_classifier", "", "imagenet_features", 1000, (30, 50, 70, 100, 155, 250)
    ),
}


def plan_for(survey: weft.Survey, experiment: Experiment, size: float) -> dict[str, LowRank]:
    """The same rank, or the same share of the parameters, for every layer."""
    plan = {}
    for name, layer in survey.layers.items():
        if name in experiment.keep:
            continue
        rows, columns = matrix_shape(layer.shape)
        rank = round(size) if size >= 1 else max(1, int(size * rows * columns / (rows + columns)))
        plan[name] = LowRank(min(rank, rows, columns))
    return plan


def run(name: str) -> dict[str, object]:
    """Runs one experiment.

    Args:
        name: its key in EXPERIMENTS.

    Returns:
        JSON-ready results.
    """
    experiment = EXPERIMENTS[name]
    weights = shared_file(experiment.weights) if experiment.weights else None
    model = load_model(f"{HERE / 'models.py'}:{experiment.model}", weights)
    data = load_data(f"{HERE / 'data.py'}:{experiment.data}")
    held_out = list(data.batches("test", batch_size=250))
    calibration = list(data.inputs("calibration", limit=experiment.samples))
    dense = accuracy(model, held_out)
    plain, weighted = weft.survey(model), weft.survey(model, calibration)
    has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    rows = []
    for size in experiment.sizes:
        plan = plan_for(plain, experiment, size)
        row: dict[str, float] = {"size": size}
        variants = {"plain": (plain, None), "input_gram": (weighted, None)}
        if has_batch_norm:
            variants["input_gram_batch_norm"] = (weighted, calibration)
        for variant, (survey, batches) in variants.items():
            small, log = weft.compress(model, plan, survey, batches=batches)
            row[variant] = accuracy(small, held_out)
            row[f"{variant}_error"] = sum(entry["error"] for entry in log) / len(log)
            row["parameters"] = sum(entry["parameters"] for entry in log)
        rows.append(row)
    return {"experiment": name, "dense": dense, "calibration_samples": experiment.samples, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=sorted(EXPERIMENTS))
    name = parser.parse_args().experiment
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        results = run(name)
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        sys.exit(0)
    table = Table(title=f"{name}: accuracy, dense {results['dense']:.4f}", title_justify="left")
    variants = [key for key in results["rows"][0] if f"{key}_error" in results["rows"][0]]
    for heading in ("rank or share", "parameters", *variants):
        table.add_column(heading.replace("_", " "), justify="right")
    for row in results["rows"]:
        cells = [f"{row[variant]:.4f}" for variant in variants]
        table.add_row(f"{row['size']:g}", f"{row['parameters']:,}", *cells)
    Console().print(table)
    (HERE / "results").mkdir(exist_ok=True)
    record = {
        **results,
        "command": f"python experiments/accuracy_by_rank.py {name}",
        "environment": surroundings(),
        "seconds": time.perf_counter() - start,
        "seed": 0,
    }
    path = write_text(HERE / "results" / f"accuracy_by_rank_{name}.json", json.dumps(record, indent=1) + "\n")
    print(f"wrote {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
