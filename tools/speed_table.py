"""Writes the table of speeds in README.md from what benchmarks/kernels.py measured.

python tools/speed_table.py benchmarks/results/kernels.json
"""

import json
import sys
from pathlib import Path

from readme_table import replace_table

MARK = "tools/speed_table.py"


def main() -> None:
    """Replaces what stands between the two comments."""
    lines = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["lines"]
    warm, cold = (
        {line: row for line, own in lines.items() for row in own["rows"] if asked(row, cache)}
        for cache in ("warm", "cold")
    )
    table = [
        "| structure | layer | batch | bytes | dense | structured | time | target | cold |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    table += [
        f"| `{row['name']}`{kind(line)} | {row['shape'][0]}×{row['shape'][1]} | {row['batch']} "
        f"| {row['bytes']:.3f} "
        f"| {row['dense']['median'] * 1e6:.1f} µs | {row['structured']['median'] * 1e6:.1f} µs "
        f"| **{row['ratio']:.3f}** | {'≤' if row['met'] else 'missed:'} {row['target']:.3f} "
        f"| {cold[line]['ratio']:.3f} |"
        for line, row in warm.items()
    ]
    machine = next(iter(lines.values()))["environment"]
    table += [
        "",
        "One linear layer on one thread, in float32 but where it says so, module call and bias included, in",
        "turns with `F.linear`; time and bytes are shares of the dense layer's. Before every timed call the",
        "same one ran four times or, in the last column, the caches were filled with other numbers, as they",
        "are inside of a large network",
        f"({machine['processor']}, torch {machine['torch']}, kernels: {machine['kernels']}).",
    ]
    replace_table(MARK, "\n".join(table))


def kind(line: str) -> str:
    """What a line says of its numbers where they are not of float32."""
    return " bfloat16" if line.endswith("bfloat16") else ""


def asked(row: dict, cache: str) -> bool:
    """Whether a row is on one thread with such caches."""
    return row.get("threads") == 1 and row["cache"] == cache


if __name__ == "__main__":
    main()
