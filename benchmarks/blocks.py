"""Matrices of blocks against the dense product: hierarchical, semiseparable and low rank, on one thread.

    python benchmarks/blocks.py --out benchmarks/results/blocks.json

Dense and structured products alternate in the same run, the module call included; the ratio is that of the
medians. `warm` is the second of two calls in a row, `cold` the first one after the round's dense product,
which has filled the caches with its own weight. `target` is the ratio asked for, at batch 1 and at batch 128
(there 1.3 times the ratio of multiply-adds and 5 %).
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from weft.measure import environment
from weft.structures.base import Structure
from weft.structures.hierarchical import Hierarchical
from weft.structures.low_rank import LowRank
from weft.structures.semiseparable import SequentiallySemiseparable

WEAK = {
    (1000, 512): {10: 0.24, 30: 0.34, 50: 0.41, 70: 0.46},
    (1000, 1024): {10: 0.17, 30: 0.31, 50: 0.38, 70: 0.48},
    (1000, 1280): {10: 0.20, 30: 0.34, 50: 0.46, 70: 0.53},
    (4096, 4096): {30: 0.05},
}
LOW_RANK = {(64, 64): (8,), (1000, 512): (10, 30, 100), (1000, 1280): (100, 300), (4096, 4096): (100,)}
FEW_STAGES = (8, 16)
OVERHEAD = 6e-6  # seconds that a low-rank product may take beyond its share of the bytes


def cases() -> list[tuple[tuple[int, int], Structure, float | None]]:
    """Shape, structure and the ratio asked for at batch 1; None where it follows from the bytes."""
    found: list[tuple[tuple[int, int], Structure, float | None]] = []
    for shape, targets in WEAK.items():
        found += [(shape, Hierarchical(rank=rank), target) for rank, target in targets.items()]
    for shape in ((1000, 1280), (1000, 2048)):
        budget = shape[0] * shape[1] // 5
        found += [(shape, SequentiallySemiseparable.largest(shape, p, budget), 0.25) for p in FEW_STAGES]
    for shape, ranks in LOW_RANK.items():
        found += [(shape, LowRank(rank), None) for rank in ranks]
    return found


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(
    dense: Callable[[], object], structured: Callable[[], object], budget: float
) -> dict[str, object]:
    """Medians and spreads of calls that take turns for about a number of seconds."""
    taken: dict[str, list[float]] = {"dense": [], "cold": [], "warm": []}
    end = time.perf_counter() + budget
    while len(taken["dense"]) < 7 or time.perf_counter() < end:
        dense()
        taken["dense"].append(seconds(dense))
        taken["cold"].append(seconds(structured))
        taken["warm"].append(seconds(structured))
    result: dict[str, object] = {"rounds": len(taken["dense"])}
    for name, values in taken.items():
        low, *_, high = statistics.quantiles(values, n=10, method="inclusive")
        result[name] = {"median": statistics.median(values), "low": low, "high": high}
    result["ratio"] = statistics.median(taken["warm"]) / statistics.median(taken["dense"])
    result["ratio_cold"] = statistics.median(taken["cold"]) / statistics.median(taken["dense"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "blocks.json")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--seconds", type=float, default=0.4, help="per comparison")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape, structure, asked in cases():
        member = structure.initialise(shape, generator=torch.Generator().manual_seed(0)).eval()
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) / shape[1] ** 0.5
        cost = member.cost()
        share = cost.bytes / (4 * weight.numel())
        for batch in arguments.batches:
            x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(2))
            with torch.no_grad():
                times = compare(partial(F.linear, x, weight), partial(member, x), arguments.seconds)
            target = None
            if batch == 1:
                target = share + OVERHEAD / times["dense"]["median"] if asked is None else asked
            elif batch == 128:
                target = 1.3 * cost.multiply_adds / weight.numel() + 0.05
            row = {
                "shape": shape,
                "structure": str(structure),
                "share": share,
                "batch": batch,
                "target": target,
            }
            rows.append({**row, **times})
            verdict = "" if target is None else f" (at most {target:.3f}: {times['ratio'] <= target})"
            print(
                f"{shape} {structure} share {share:.3f}, batch {batch}: {times['ratio']:.3f}{verdict}",
                flush=True,
            )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    result = {"environment": {**environment(), "commit": commit}, "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
