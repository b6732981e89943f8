"""Every family's kernel against the dense product, at the sizes and settings that have a target.

    python benchmarks/kernels.py --out benchmarks/results/kernels.json
    python tools/speed_table.py benchmarks/results/kernels.json     # writes the README's table

A line is a structure, a shape and a target: the largest ratio of the structured layer's time, module call and
bias included, to that of `F.linear` in the same run, in float32; or both in bfloat16, by the same targets,
where the line says so. Families come from the registry by name, and a line whose family or setting is not
there is reported as missing. The targets hold on one thread with warm caches (the same call ran four times
before, as in a loop over one layer); the rows for two threads and for cold caches (much else ran before, as
in a large network) are there to be seen. `--only TEXT` measures the lines that contain the text and keeps the
others as an earlier run left them.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from weft.bench import CACHES, Comparison, compare_layers, members_of_size, record
from weft.structures import families, from_text
from weft.structures.base import StructuredMatrix

OVERHEAD = 6e-6
Target = Callable[[Comparison], float]


def at_most(ratio: float) -> Target:
    return lambda row: ratio


def by_bytes(row: Comparison) -> float:
    """The share of bytes that are read, and six microseconds."""
    return row.bytes + OVERHEAD / row.dense.median


def by_multiply_adds(row: Comparison) -> float:
    """What a product at large batch is limited by."""
    return 1.3 * row.multiply_adds + 0.05


@dataclass(frozen=True)
class Line:
    """One target.

    Attributes:
        structure: as text, or a family's name for the member nearest to a share of the bytes.
        shape: (outputs, inputs).
        batch: input vectors per call.
        target: the largest ratio allowed.
        share: of the bytes, where the structure is a family's name.
        fitted: whether the size depends on the weight, so that a random member would not be it.
        halves: whether weights and vectors are of bfloat16, the dense ones too.
    """

    structure: str
    shape: tuple[int, int]
    batch: int
    target: Target
    share: float | None = None
    fitted: bool = False
    halves: bool = False

    @property
    def name(self) -> str:
        size = "" if self.share is None else f" at {self.share:.0%} of the bytes"
        kind = ", bfloat16" if self.halves else ""
        return f"{self.structure}{size}, {self.shape[0]}x{self.shape[1]}, batch {self.batch}{kind}"

    def member(self) -> StructuredMatrix:
        return self._float_member().to(torch.bfloat16 if self.halves else torch.float32)

    def _float_member(self) -> StructuredMatrix:
        generator = torch.Generator().manual_seed(0)
        if self.share is not None:
            members, _ = members_of_size([families()[self.structure]], self.shape, self.share)
            return members[0]
        structure = from_text(self.structure)
        if self.fitted:
            return structure.fit(torch.randn(self.shape, generator=generator))
        return structure.initialise(self.shape, generator=generator)


def hierarchical(shape: tuple[int, int], ratios: dict[int, float]) -> list[Line]:
    return [
        Line(f"Hierarchical(rank={rank}, leaf_size=64)", shape, 1, at_most(r)) for rank, r in ratios.items()
    ]


LINES = [
    *hierarchical((1000, 512), {10: 0.24, 30: 0.34, 50: 0.41, 70: 0.46}),
    *hierarchical((1000, 1024), {10: 0.17, 30: 0.31, 50: 0.38, 70: 0.48}),
    *hierarchical((1000, 1280), {10: 0.20, 30: 0.34, 50: 0.46, 70: 0.53}),
    *hierarchical((4096, 4096), {30: 0.05}),
    *(Line(f"LowRank(rank={rank})", (1000, 1280), 1, by_bytes) for rank in (8, 30, 100, 300)),
    *(Line(f"Interpolative(rank={rank})", (1000, 1280), 1, by_bytes) for rank in (100, 300)),
    *(
        Line("SequentiallySemiseparable", (1000, width), 1, at_most(0.25), share=0.2)
        for width in (1280, 2048)
    ),
    Line("SparseProduct(factors=2, sparsity=14)", (1000, 1280), 1, at_most(0.25), fitted=True),
    Line("Pruned(density=0.05)", (1000, 1280), 1, at_most(0.28)),
    *(
        Line(f"Quantized(bits={bits}{more})", shape, 1, at_most(ratio))
        for shape in ((1000, 1280), (4096, 4096))
        for bits, more, ratio in (
            (8, ", activations=int8", 0.35),
            (4, ", activations=int8", 0.25),
            (8, "", 0.5),
            (4, "", 0.35),
        )
    ),
    Line("LowRank(rank=100)", (1000, 1280), 1, by_bytes, halves=True),
    Line("Hierarchical(rank=30, leaf_size=64)", (1000, 1280), 1, at_most(0.34), halves=True),
    Line("SequentiallySemiseparable", (1000, 1280), 1, at_most(0.25), share=0.2, halves=True),
    Line("SparseProduct(factors=2, sparsity=14)", (1000, 1280), 1, at_most(0.25), fitted=True, halves=True),
    Line("Pruned(density=0.05)", (1000, 1280), 1, at_most(0.28), halves=True),
    Line("Quantized(bits=8, activations=int8)", (1000, 1280), 1, at_most(0.35), halves=True),
    Line("Quantized(bits=4)", (1000, 1280), 1, at_most(0.35), halves=True),
    # Their codes are of interest for storage: no target but the dense time.
    *(
        Line(f"ProductQuantized(subspaces={shape[1] // 8}, codewords=256)", shape, 1, at_most(1.0))
        for shape in ((1000, 1280), (4096, 4096))
    ),
    *(
        Line(structure, (1000, 1280), 128, by_multiply_adds, **more)
        for structure, more in (
            ("Hierarchical(rank=30, leaf_size=64)", {}),
            ("LowRank(rank=100)", {}),
            ("Interpolative(rank=100)", {}),
            ("SequentiallySemiseparable", {"share": 0.2}),
            ("SparseProduct(factors=2, sparsity=14)", {"fitted": True}),
            ("Pruned(density=0.05)", {}),
            ("Quantized(bits=8, activations=int8)", {}),
            ("Quantized(bits=4)", {}),
        )
    ),
]


def measure(line: Line, seconds: float, thread_counts: list[int]) -> list[dict[str, object]]:
    """The rows of one line; one that says why where there is no such member."""
    try:
        member = line.member()
    except (ValueError, KeyError, IndexError) as error:
        return [{"line": line.name, "missing": str(error)}]
    rows = compare_layers(
        [member],
        batches=[line.batch],
        thread_counts=thread_counts,
        caches=CACHES,
        seconds=seconds,
        shown=False,
    )
    found = []
    for row in rows:
        target = line.target(row)
        found.append({"line": line.name, "target": target, "met": row.ratio <= target, **row.to_json()})
    return found


def judged(row: dict) -> bool:
    """Whether a row is one for which the target was set."""
    return row.get("threads") == 1 and row["cache"] == "warm"


def show(row: dict) -> None:
    if "missing" in row:
        print(f"{row['line']}: missing: {row['missing']}", flush=True)
        return
    verdict = "met" if row["met"] else "MISSED"
    print(
        f"{row['line']}, {row['threads']} thread{'s' * (row['threads'] > 1)}, {row['cache']}: "
        f"{row['structured']['median'] * 1e6:.1f} us against {row['dense']['median'] * 1e6:.1f} us, "
        f"ratio {row['ratio']:.3f}, target {row['target']:.3f}, {verdict}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parent / "results" / "kernels.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--only", default="", help="a part of a line, such as a family's name")
    parser.add_argument("--seconds", type=float, default=0.6, help="per line and number of threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    lines = [line for line in LINES if arguments.only in line.name]
    if not lines:
        parser.error(f"--only {arguments.only}: no line contains it; the lines are\n" + "\n".join(names()))
    started = time.perf_counter()
    measured: dict[str, dict[str, object]] = {}
    for line in lines:
        rows = measure(line, arguments.seconds, arguments.threads)
        measured[line.name] = {
            **record([]),
            "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        measured[line.name]["rows"] = rows
        for row in rows:
            show(row)
    kept = json.loads(arguments.out.read_text())["lines"] if arguments.out.exists() else {}
    ordered = {name: measured.get(name) or kept.get(name) for name in names()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"lines": {name: line for name, line in ordered.items() if line}}, indent=1)
    arguments.out.write_text(text + "\n")
    rows = [row for line in measured.values() for row in line["rows"] if judged(row)]
    met = sum(bool(row["met"]) for row in rows)
    mean = math.prod(row["ratio"] for row in rows) ** (1 / max(1, len(rows)))
    print(
        f"{met} of {len(rows)} targets met on one thread, geometric mean of the ratios {mean:.3f}; "
        f"{time.perf_counter() - started:.0f} s; wrote {arguments.out}",
        file=sys.stderr,
    )


def names() -> list[str]:
    return [line.name for line in LINES]


if __name__ == "__main__":
    main()
