"""Accuracy against bytes: all families alone and combined, on the MobileNetV2 classifier.

    python experiments/bytes_frontier.py
    python experiments/bytes_frontier.py --only LowRank

Every structure is fitted to the 1000×1280 weight in the metric of 8,000 unlabelled calibration features
(random crops of the sample images); the first rows are rounded to the nearest level without any data. For
every budget the structure with the least error in that metric is chosen: f_val decides nothing and is only
reported, with and without the correction of the bias. Prints the table and writes it, after every row, to
experiments/results/bytes_frontier.json; rows that are there already are kept. Draws bytes_frontier.svg beside
it where matplotlib is installed. Skips with a message where there are no data.
"""

import argparse
import json
import sys
import time
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
from weft.sources import load_data, load_model
from weft.storage import write_beside, write_text
from weft.structures import family as family_of
from weft.structures.base import Structure, relative_error
from weft.structures.low_rank import LowRank
from weft.structures.product_quantized import ProductQuantized
from weft.structures.pruned import Pruned
from weft.structures.reshaped import Reshaped
from weft.structures.sparse_product import SparseProduct
from weft.structures.sum_of import SumOf

Quantized: Any = family_of("Quantized")
HERE = Path(__file__).parent
RESULTS = HERE / "results"
BUDGETS = (0.125, 0.1, 0.0625, 0.035, 0.02)


def searched(density: float) -> Pruned:
    return Pruned(density, score="search")


def sparse(entries: int) -> SparseProduct:
    return SparseProduct(2, entries, "splitting")


# By kind and family: structures, dearest first.
STRUCTURES: dict[tuple[str, str], list[Structure]] = {
    ("nearest level", "Quantized"): [Quantized(bits, rounding="nearest") for bits in (8, 5, 4, 3)]
    + [Quantized(2, zero=zero, rounding="nearest") for zero in ("level", "between")],
    ("single", "Quantized"): [Quantized(4), Quantized(3), Quantized(2, zero="between")]
    + [Quantized(2, codebook="ternary"), Quantized(1, codebook="binary")],
    ("single", "Quantized, codebook"): [
        Quantized(bits, codebook=kind) for bits in (3, 2) for kind in ("kmeans", "kmeans_rows")
    ],
    ("single", "ProductQuantized"): [
        ProductQuantized(320, 256),
        ProductQuantized(640, 16),
        ProductQuantized(256, 256),
        ProductQuantized(160, 256),
        ProductQuantized(320, 16),
        ProductQuantized(128, 256),
        ProductQuantized(80, 256),
    ],
    ("single", "Pruned"): [searched(density) for density in (0.2, 0.1, 0.07, 0.05, 0.03)],
    ("single", "LowRank"): [LowRank(rank) for rank in (112, 70, 56, 35, 20)],
    ("single", "Reshaped LowRank"): [
        Reshaped(LowRank(rank), rows) for rank, rows in ((97, 2000), (60, 2000), (35, 4000), (48, 2000))
    ],
    ("single", "SparseProduct"): [sparse(entries) for entries in (28, 14)],
    ("combined", "Quantized LowRank"): [Quantized(4, LowRank(rank)) for rank in (440, 275, 150)],
    ("combined", "Quantized Reshaped"): [Quantized(4, Reshaped(LowRank(130), 2000))],
    ("combined", "Pruned + codebook"): [
        Quantized(bits, searched(density), codebook="kmeans")
        for density, bits in ((0.2, 3), (0.1, 4), (0.1, 3), (0.07, 3), (0.05, 4))
    ],
    ("combined", "Quantized SparseProduct"): [Quantized(4, sparse(entries)) for entries in (47, 25)],
    ("combined", "Sum of ProductQuantized and others"): [
        SumOf((ProductQuantized(80, 256), searched(0.005))),
        SumOf((ProductQuantized(80, 256), ProductQuantized(40, 256))),
        SumOf((ProductQuantized(160, 256), Quantized(4, LowRank(24)))),
        SumOf((ProductQuantized(160, 256), ProductQuantized(128, 256))),
    ],
    ("combined", "Sum of Quantized and LowRank"): [
        SumOf((Quantized(1, codebook="binary"), Quantized(4, LowRank(24)))),
        SumOf((Quantized(2, zero="between"), Quantized(8, LowRank(16)))),
    ],
}


class Classifier:
    """The dense layer, its survey, and what every fit is judged by."""

    def __init__(self) -> None:
        shared_file("imagenet_features/mobilenet_v2.npz")
        self.model: Any = load_model(f"{HERE / 'models.py'}:mobilenet_v2_classifier")
        sample = load_data(f"{HERE / 'data.py'}:imagenet_features")
        crops = load_data(f"{HERE / 'data.py'}:imagenet_crops")
        self.survey = weft.survey(self.model, crops.inputs("train", batch_size=1000))
        self.plain = weft.survey(self.model)
        self.held_out = list(sample.batches("test", batch_size=1300))
        self.sample = torch.cat(list(sample.inputs("train", batch_size=1000)))

    def dense_accuracy(self) -> float:
        return accuracy(self.model, self.held_out)

    @torch.no_grad()
    def row(self, structure: Structure, *, with_data: bool) -> dict[str, Any]:
        start = time.perf_counter()
        survey, layer = self.survey if with_data else self.plain, self.survey.layers[""]
        small, log = weft.compress(self.model, {"": structure}, survey, shown=False)
        seconds = time.perf_counter() - start
        dense: nn.Linear = self.model
        corrected = small.bias.clone()
        same = small(self.sample).argmax(1) == dense(self.sample).argmax(1)
        top = accuracy(small, self.held_out)
        small.bias.copy_(dense.bias)
        plain = accuracy(small, self.held_out)
        small.bias.copy_(corrected)
        return {
            "structure": str(structure),
            "json": structure.to_json(),
            "bytes": log[0]["bytes"],
            "bytes_share": log[0]["bytes"] / (4 * dense.weight.numel()),
            "parameters": log[0]["parameters"],
            "multiply_adds": log[0]["multiply_adds"],
            "weighted_error": relative_error(
                layer.weight, small.matrix.to_dense(), input_gram=layer.input_gram
            ),
            "agreement_on_sample": float(same.float().mean()),
            "accuracy": top,
            "accuracy_without_bias_correction": plain,
            "seconds": seconds,
        }


def chosen(rows: list[dict[str, Any]], budget: float, kinds: set[str]) -> dict[str, Any] | None:
    """Within the bytes, the row of these kinds with the least error on the calibration data."""
    within = [row for row in rows if row["kind"] in kinds and row["bytes_share"] <= budget]
    return min(within, key=lambda row: row["weighted_error"], default=None)


def show(rows: list[dict[str, Any]], dense: float) -> None:
    table = Table(title=f"MobileNetV2 classifier, top-1 on f_val, dense {dense:.4f}", title_justify="left")
    for heading in ("kind", "structure", "bytes", "error", "agrees", "top-1", "bias kept", "s"):
        left = heading in {"kind", "structure"}
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for row in sorted(rows, key=lambda row: (row["bytes_share"], row["weighted_error"])):
        figures = (row["weighted_error"], row["agreement_on_sample"], row["accuracy"])
        table.add_row(
            row["kind"],
            row["structure"],
            f"{row['bytes_share']:.4f}",
            *(f"{figure:.4f}" for figure in figures),
            f"{row['accuracy_without_bias_correction']:.4f}",
            f"{row['seconds']:.0f}",
        )
    Console(width=150).print(table)
    table = Table(
        title="Chosen by the error on the calibration data, within a share of the bytes", title_justify="left"
    )
    for heading in ("bytes", "nearest level", "top-1", "one family", "top-1", "combination", "top-1"):
        table.add_column(heading, overflow="fold")
    for budget in BUDGETS:
        cells = []
        for kind in ("nearest level", "single", "combined"):
            row = chosen(rows, budget, {kind})
            cells += ["none", ""] if row is None else [row["structure"], f"{row['accuracy']:.4f}"]
        table.add_row(f"{budget:g}", *cells)
    Console(width=150).print(table)


def plot(rows: list[dict[str, Any]], dense: float, path: Path) -> bool:
    """Draws accuracy against bytes; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    markers = {"nearest level": "x", "single": "o", "combined": "^"}
    families = list(dict.fromkeys((row["kind"], row["family"]) for row in rows))
    for index, (kind, family) in enumerate(families):
        own = sorted(
            (row for row in rows if (row["kind"], row["family"]) == (kind, family)),
            key=lambda row: row["bytes_share"],
        )
        label = f"{family}, nearest level" if kind == "nearest level" else family
        points = [row["bytes_share"] for row in own], [row["accuracy"] for row in own]
        style = "-" if kind != "combined" else "--"
        axes.plot(*points, style, marker=markers[kind], color=f"C{index % 10}", label=label, linewidth=1)
    axes.axhline(dense, color="black", linewidth=0.8, label=f"dense, {dense:.3f}")
    axes.set(xscale="log", ylim=(0.5, 0.82), xlabel="bytes, share of float32", ylabel="top-1 on f_val")
    axes.set_title("MobileNetV2 classifier, no training")
    axes.legend(fontsize=7, ncols=2)
    write_beside(path, lambda beside: figure.savefig(beside, format="svg"))
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", help="run the missing rows of these families only")
    parser.add_argument("--fresh", action="store_true", help="run every row again")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    try:
        classifier = Classifier()
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        sys.exit(0)
    dense, path = classifier.dense_accuracy(), RESULTS / "bytes_frontier.json"
    before = [] if arguments.fresh or not path.exists() else json.loads(path.read_text())["rows"]
    wanted = {
        str(structure): (kind, family, structure)
        for (kind, family), structures in STRUCTURES.items()
        for structure in structures
    }
    rows = [row for row in before if row["structure"] in wanted]
    done = {row["structure"] for row in rows}
    for name, (kind, family, structure) in wanted.items():
        if name in done or (arguments.only and family not in arguments.only):
            continue
        row = {
            "kind": kind,
            "family": family,
            **classifier.row(structure, with_data=kind != "nearest level"),
            "commit": commit(),
        }
        rows.append(row)
        print(f"{row['bytes_share']:.4f} {row['accuracy']:.4f} {name} ({row['seconds']:.0f} s)", flush=True)
        record = {
            "dense_accuracy": dense,
            "rows": rows,
            "command": "python experiments/bytes_frontier.py",
            "environment": surroundings(),
            "seed": 0,
        }
        write_text(path, json.dumps(record, indent=1) + "\n")
    show(rows, dense)
    drawn = plot(rows, dense, path.with_suffix(".svg"))
    print(f"wrote {path.relative_to(HERE.parent)}{' and its plot' if drawn else ' (no matplotlib: no plot)'}")


if __name__ == "__main__":
    main()
