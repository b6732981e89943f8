"""Writes the table at the head of README.md from a real run.

python tools/readme_table.py demo/run.json
"""

import sys
from pathlib import Path

from weft.report.report import Report

MARK, END = "tools/readme_table.py", "<!-- end of table -->"


def main() -> None:
    """Replaces what stands between the two comments."""
    report, command, _ = Report.load(sys.argv[1])
    machine = report.environment
    lines = ["| | dense | compressed | rate |", "|---|---:|---:|---:|"]
    told = ("accuracy", "parameters", "bytes", "multiply-adds")
    rows = [row for row in report.rows() if row[0] in told or row[0].startswith("latency")]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += [
        "",
        "A small convolutional network on scikit-learn's digits, held-out images, compressed to a quarter of",
        f"its parameters by `make demo` (low rank; {machine['processor']}, torch {machine['torch']}).",
    ]
    replace_table(MARK, "\n".join(lines))


def replace_table(mark: str, table: str) -> None:
    """Puts a table between the comment `<!-- table: MARK ... -->` of README.md and the next `END`.

    Args:
        mark: the script that writes the table.
        table: its lines.
    """
    readme = Path(__file__).parent.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(f"<!-- table: {mark}", 1)
    opening, rest = rest.split("\n", 1)
    _, tail = rest.split(END, 1)
    readme.write_text(f"{head}<!-- table: {mark}{opening}\n{table}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
