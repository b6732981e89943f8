"""Writes the table of whole networks in README.md from what benchmarks/end_to_end.py measured.

python tools/networks_table.py benchmarks/results/end_to_end.json
"""

import json
import sys
from pathlib import Path

from readme_table import replace_table

MARK = "tools/networks_table.py"


def main() -> None:
    """Replaces what stands between the two comments."""
    parts = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    lines: list[str] = []
    for part in parts.values():
        rows = part["rows"]
        cases = sorted({(row["threads"], row["batch"]) for row in rows})
        headings = [f"batch {batch}, {count} thread{'s' * (count > 1)}" for count, batch in cases]
        lines += [
            f"| {rows[0]['network']} | MB | agreement | {' | '.join(headings)} |",
            "|---|---:|---:|" + "---:|" * len(cases),
        ]
        for way in dict.fromkeys(row["way"] for row in rows):
            own = {(row["threads"], row["batch"]): row for row in rows if row["way"] == way}
            largest = own[max(cases, key=lambda case: case[1])]
            times = " | ".join(f"{own[case]['seconds'] * 1e3:.1f} ms" for case in cases)
            size, agreement = largest["bytes"] / 1e6, largest["agreement"]
            lines.append(f"| {way} | {size:.1f} | {agreement:.3f} | {times} |")
        lines.append("")
    machine = next(iter(parts.values()))["environment"]
    lines += [
        "Medians of calls in turns; PyTorch's eager mode where nothing else is said, in which small networks",
        "on two threads mostly wait for each other. Agreement with the dense network on real inputs: mean",
        "cosine of the sentences' vectors, or share of images of the same class. Nothing is trained; no data",
        "for MiniLM",
        f"({machine['processor']}, torch {machine['torch']}, onnxruntime {machine['onnxruntime']}).",
    ]
    replace_table(MARK, "\n".join(lines))


if __name__ == "__main__":
    main()
