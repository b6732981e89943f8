"""Pruning of the MobileNetV2 classifier: top-1 accuracy by density, score and pattern, without training.

    python experiments/pruning.py

Calibrated on 8,000 crops of the sample images, measured on the 1,300 images of val. Prints a table and writes
experiments/results/pruning.json. Skips with a message where the data folder (../shared/data, or WEFT_DATA) is
absent.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import weft
from weft.bench import surroundings
from weft.measure import accuracy, footprint
from weft.sources import load_data, load_model
from weft.storage import write_text
from weft.structures.base import Structure
from weft.structures.low_rank import LowRank
from weft.structures.pruned import Pruned

HERE = Path(__file__).parent
DENSITIES = (0.2, 0.1, 0.05)


def structures(density: float) -> list[Structure]:
    """What is compared at one density; sparse low rank of as many values."""
    rank = round(density / 0.4 * 1_280_000 / 2280)
    return [
        Pruned(density, reconstruct=False),
        Pruned(density),
        Pruned(density, score="input", reconstruct=False),
        Pruned(density, score="input"),
        Pruned(density, score="search"),
        Pruned(density, pattern="4x4", score="search"),
        Pruned(density, pattern="columns", score="search"),
        Pruned(0.4, of=LowRank(rank), score="search"),
        LowRank(round(density * 1_280_000 / 2280)),
    ]


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
    rows = []
    for density in DENSITIES:
        chosen = structures(density)
        if density == DENSITIES[0]:
            chosen.append(Pruned(0.5, pattern="2:4", score="search"))
        for structure in chosen:
            start = time.perf_counter()
            small, log = weft.compress(model, {"": structure}, survey)
            seconds = time.perf_counter() - start
            found = footprint(small)
            rows.append({
                "structure": structure.to_json(),
                "name": str(structure),
                "top1": accuracy(small, held_out),
                "error": log[0]["error"],
                "bytes": found.stored / dense_bytes,
                "entropy_bound": found.entropy_bound / dense_bytes,
                "seconds": seconds,
            })
    return {"experiment": "pruning", "dense": accuracy(model, held_out), "rows": rows}


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
    for heading in ("structure", "top-1", "relative error", "bytes", "seconds"):
        table.add_column(heading, justify="left" if heading == "structure" else "right")
    for row in results["rows"]:
        numbers = (
            f"{row['top1']:.4f}",
            f"{row['error']:.4f}",
            f"{row['bytes']:.4f}",
            f"{row['seconds']:.1f}",
        )
        table.add_row(row["name"], *numbers)
    Console(width=120).print(table)
    (HERE / "results").mkdir(exist_ok=True)
    record = {
        **results,
        "command": "python experiments/pruning.py",
        "environment": surroundings(),
        "total_seconds": time.perf_counter() - start,
    }
    path = write_text(HERE / "results" / "pruning.json", json.dumps(record, indent=1) + "\n")
    print(f"wrote {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
