"""The families of the papers at the same size: errors and accuracy, plain and weighted.

    python experiments/three_families.py

On the MobileNetV2 classifier (1000×1280) at 10, 20 and 40 % of the parameters: every family is fitted plainly
and with the input Gram of the unlabelled calibration features (f_sample), and evaluated on f_val. Prints one
table and writes experiments/results/three_families.json. Skips with a message where there are no data.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from data import shared_file
from rich.console import Console
from rich.table import Table

import weft
from weft.bench import surroundings
from weft.measure import accuracy
from weft.sources import load_data, load_model
from weft.storage import write_text
from weft.structures.base import Structure, matrix_shape, relative_error
from weft.structures.hierarchical import Hierarchical
from weft.structures.interpolative import Interpolative
from weft.structures.low_rank import LowRank
from weft.structures.semiseparable import SequentiallySemiseparable
from weft.structures.sparse_product import SparseProduct
from weft.survey import LayerSurvey

HERE = Path(__file__).parent
SHARES = (0.1, 0.2, 0.4)


def low_rank(layer: LayerSurvey, parameters: int) -> Structure:
    """The largest rank within the parameters."""
    return LowRank(parameters // sum(matrix_shape(layer.shape)))


def interpolative(layer: LayerSurvey, parameters: int) -> Structure:
    """The same matrices in fewer numbers, hence of a larger rank."""
    shape = matrix_shape(layer.shape)
    members = map(Interpolative, range(1, min(shape)))
    return [member for member in members if member.parameter_count(shape) <= parameters][-1]


def weak(layer: LayerSurvey, parameters: int) -> Structure:
    """The published form, weak admissibility; leaves as small as lets ten per cent hold a rank."""
    return largest(Hierarchical(rank=1, leaf_size=32), layer, parameters)


def uniform(layer: LayerSurvey, parameters: int) -> Structure:
    """Block low rank on clusters of the weight's own rows and columns."""
    structure = Hierarchical(rank=1, leaf_size=62, admissibility="uniform", clustering="principal")
    return largest(structure, layer, parameters)


def largest(structure: Hierarchical, layer: LayerSurvey, parameters: int) -> Structure:
    """The same layout with the largest rank within the parameters, orders and tables not counted."""
    low, high = 1, min(matrix_shape(layer.shape))
    while high - low > 1:
        middle = (low + high) // 2
        count = replace(structure, rank=middle, clustering="cardinality").parameter_count(layer.shape)
        low, high = (middle, high) if count is not None and count <= parameters else (low, middle)
    return replace(structure, rank=low)


def semiseparable(layer: LayerSurvey, parameters: int) -> Structure:
    """The family's own search over stages and state dimension."""
    return SequentiallySemiseparable.search(layer.weight, parameters)


def sparse_product(layer: LayerSurvey, parameters: int) -> Structure:
    """Two factors; the union of the K largest per row and per column holds up to 5 % more than K per line."""
    return SparseProduct(2, parameters * 95 // (100 * sum(matrix_shape(layer.shape))))


FAMILIES: dict[str, Callable[[LayerSurvey, int], Structure]] = {
    "LowRank": low_rank,
    "Interpolative": interpolative,
    "Hierarchical, weak": weak,
    "Hierarchical, uniform": uniform,
    "SequentiallySemiseparable": semiseparable,
    "SparseProduct": sparse_product,
}


def run() -> list[dict[str, object]]:
    """Fits every family at every share.

    Returns:
        JSON-ready rows.
    """
    shared_file("imagenet_features/mobilenet_v2.npz")
    model = load_model(f"{HERE / 'models.py'}:mobilenet_v2_classifier")
    data = load_data(f"{HERE / 'data.py'}:imagenet_features")
    held_out = list(data.batches("test", batch_size=1300))
    plain = weft.survey(model)
    weighted = weft.survey(model, data.inputs("calibration", limit=1000))
    layer = weighted.layers[""]
    rows: list[dict[str, object]] = []
    for share in SHARES:
        for name, choose in FAMILIES.items():
            structure = choose(plain.layers[""], int(share * layer.weight.numel()))
            row: dict[str, object] = {"share": share, "family": name, "structure": str(structure)}
            for variant, survey in (("plain", plain), ("weighted", weighted)):
                start = time.perf_counter()
                small, log = weft.compress(model, {"": structure}, survey)
                row[f"{variant}_seconds"] = time.perf_counter() - start
                dense = small.matrix.to_dense()
                row[f"{variant}_parameters"] = log[0]["parameters"]
                row[f"{variant}_error"] = relative_error(layer.weight, dense)
                row[f"{variant}_weighted_error"] = relative_error(
                    layer.weight, dense, input_gram=layer.input_gram
                )
                row[f"{variant}_accuracy"] = accuracy(small, held_out)
            row["ratio"] = row["weighted_weighted_error"] / row["plain_weighted_error"]
            rows.append(row)
            top = f"{row['plain_accuracy']:.4f} -> {row['weighted_accuracy']:.4f}"
            print(f"{share:.0%} {structure}: {top}", flush=True)
    return rows


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.manual_seed(0)
    try:
        rows = run()
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        sys.exit(0)
    table = Table(title="MobileNetV2 classifier, f_val; plain -> weighted", title_justify="left")
    for heading in ("share", "structure", "parameters", "error", "weighted error", "ratio", "top-1"):
        table.add_column(heading, justify="left" if heading == "structure" else "right", overflow="fold")
    for row in rows:
        pairs = [
            f"{row[f'plain_{key}']:.3f} -> {row[f'weighted_{key}']:.3f}"
            for key in ("error", "weighted_error", "accuracy")
        ]
        counts = f"{row['plain_parameters']:,}"
        table.add_row(
            f"{row['share']:.0%}",
            row["structure"],
            counts,
            pairs[0],
            pairs[1],
            f"{row['ratio']:.3f}",
            pairs[2],
        )
    Console(width=150).print(table)
    record = {
        "rows": rows,
        "command": "python experiments/three_families.py",
        "environment": surroundings(),
        "seed": 0,
    }
    path = write_text(HERE / "results" / "three_families.json", json.dumps(record, indent=1) + "\n")
    print(f"wrote {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
