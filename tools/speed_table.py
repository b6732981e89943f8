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
    rows = [row for line in lines.values() for row in line["rows"] if row.get("threads") == 1]
    table = [
        "| structure | layer | batch | bytes | dense | structured | time | target |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    table += [
        f"| `{row['name']}` | {row['shape'][0]}×{row['shape'][1]} | {row['batch']} | {row['bytes']:.3f} "
        f"| {row['dense']['median'] * 1e6:.1f} µs | {row['structured']['median'] * 1e6:.1f} µs "
        f"| **{row['ratio']:.3f}** | {'≤' if row['met'] else 'missed:'} {row['target']:.3f} |"
        for row in rows
    ]
    machine = next(iter(lines.values()))["environment"]
    table += [
        "",
        "One linear layer in float32 on one thread, module call and bias included, in turns with `F.linear`;",
        f"time and bytes are shares of the dense layer's ({machine['processor']}, torch {machine['torch']},",
        f"kernels: {machine['kernels']}).",
    ]
    replace_table(MARK, "\n".join(table))


if __name__ == "__main__":
    main()
