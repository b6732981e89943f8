"""Writes the table at the head of README.md from a real run.

python tools/readme_table.py demo/run.json
"""

import sys
from pathlib import Path

from weft.report.report import Report

START, END = "<!-- table: tools/readme_table.py", "<!-- end of table -->"


def main() -> None:
    """Replaces what stands between the two comments."""
    report, command = Report.load(sys.argv[1])
    machine = report.environment
    lines = ["| | dense | compressed | rate |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in report.rows()]
    lines += [
        "",
        "A small convolutional network on scikit-learn's digits, held-out images, compressed to a quarter of",
        f"its parameters by `make demo` (low rank; {machine['processor']}, torch {machine['torch']}).",
    ]
    readme = Path(__file__).parent.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(START, 1)
    opening, rest = rest.split("\n", 1)
    _, tail = rest.split(END, 1)
    table = "\n".join(lines)
    readme.write_text(f"{head}{START}{opening}\n{table}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
