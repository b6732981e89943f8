"""Quantisation of the MobileNetV2 classifier: top-1 accuracy by bits and kind of levels, without training.

    python experiments/quantisation.py

Calibrated on 8,000 crops of the sample images, measured on the 1,300 images of val. "Largest entry" is plain
rounding with scales that reach the largest entry of every row, the usual reference. Prints a table and writes
experiments/results/quantisation.json. Skips with a message where the data folder (../shared/data, or
WEFT_DATA) is absent.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import weft
from weft.bench import surroundings
from weft.measure import accuracy, footprint
from weft.sources import load_data, load_model
from weft.storage import write_text
from weft.structures.base import Structure
from weft.structures.low_rank import LowRank
from weft.structures.pruned import Pruned
from weft.structures.quantized import Quantized

HERE = Path(__file__).parent
STRUCTURES: tuple[Structure, ...] = (
    Quantized(1, codebook="binary"),
    Quantized(2, codebook="ternary", rounding="nearest"),
    Quantized(2, codebook="ternary"),
    Quantized(2, zero="between", rounding="nearest"),
    Quantized(2, zero="between"),
    Quantized(2, codebook="kmeans"),
    Quantized(2, codebook="kmeans_rows"),
    Quantized(3),
    Quantized(4),
    Quantized(8),
    Quantized(4, of=LowRank(200)),
    Quantized(4, of=Pruned(0.1, score="search"), codebook="kmeans"),
)


def largest_entry(model: nn.Module, bits: int) -> nn.Module:
    """The model with weights rounded to 2^bits levels that reach the largest entry of their row.

    Args:
        model: a linear layer.
        bits: per entry.

    Returns:
        A copy with other weights.
    """
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                top = 2 ** (bits - 1)
                scale = parameter.abs().amax(1, keepdim=True) / (top - 1)
                parameter.copy_((parameter / scale).round().clamp(-top, top - 1) * scale)
    return model


def run() -> dict[str, object]:
    """Fits and measures everything.

    Returns:
        JSON-ready results.
    """
    model = load_model(f"{HERE / 'models.py'}:mobilenet_v2_classifier", None)
    data = load_data(f"{HERE / 'data.py'}:imagenet_crops")
    held_out = list(data.batches("test", batch_size=1300))
    survey = weft.survey(model, list(data.inputs("train")))
    dense_bytes = footprint(model).stored
    rows: list[dict[str, object]] = [
        {"name": f"largest entry, {bits} bits", "top1": accuracy(largest_entry(model, bits), held_out)}
        for bits in (2, 3, 4)
    ]
    for structure in STRUCTURES:
        start = time.perf_counter()
        small, log = weft.compress(model, {"": structure}, survey)
        rows.append({
            "name": str(structure),
            "structure": structure.to_json(),
            "top1": accuracy(small, held_out),
            "error": log[0]["error"],
            "bytes": footprint(small).stored / dense_bytes,
            "seconds": time.perf_counter() - start,
        })
    return {"experiment": "quantisation", "dense": accuracy(model, held_out), "rows": rows}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    start = time.perf_counter()
    try:
        results = run()
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        sys.exit(0)
    table = Table(title=f"MobileNetV2 classifier, dense {results['dense']:.4f}", title_justify="left")
    formats = {"top1": ".4f", "error": ".4f", "bytes": ".4f", "seconds": ".1f"}
    table.add_column("structure")
    for heading in formats:
        table.add_column(heading, justify="right")
    for row in results["rows"]:
        table.add_row(
            row["name"], *(format(row[key], how) if key in row else "" for key, how in formats.items())
        )
    Console(width=130).print(table)
    record = {
        **results,
        "command": "python experiments/quantisation.py",
        "environment": surroundings(),
        "total_seconds": time.perf_counter() - start,
    }
    path = write_text(HERE / "results" / "quantisation.json", json.dumps(record, indent=1) + "\n")
    print(f"wrote {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
