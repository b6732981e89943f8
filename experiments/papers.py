"""Writes docs/papers.md: what the source papers report beside what we measure, from the results on disk.

    python experiments/papers.py

Runs nothing; run the experiments first. A figure of a paper stands in brackets or a column beside ours. Where
an experiment has been run in its reduced form alone, that is what is shown, and its command says so.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import denton
import giffon
import huelder
import kissel_diepold
import learning_compression
import psm_nets
from records import Records, Sheet

from weft.storage import write_text

PAPERS: dict[str, tuple[str, Callable[[Records], Iterable[Sheet]]]] = {
    "huelder": ("Hülder: hierarchical matrices on classifier layers", huelder.sheets),
    "kissel_diepold": ("Kissel and Diepold 2022: semiseparable classifiers", kissel_diepold.sheets),
    "giffon": ("Giffon et al. 2021: PSM-nets, products of sparse matrices", giffon.sheets),
    "denton": ("Denton et al. 2014: exploiting linear structure", denton.sheets),
    "learning_compression": (
        "Idelbayev and Carreira-Perpiñán 2020, 2021: learning-compression",
        learning_compression.sheets,
    ),
    "psm_nets": ("Giffon et al. 2021: PSM-nets from three starts", psm_nets.sheets),
}
HEAD = """# The papers' experiments

Written by `python experiments/papers.py` from the files in `experiments/results/`; do not edit.
"""


def main() -> None:
    parts = [HEAD]
    for name, (title, sheets) in PAPERS.items():
        records = Records(name)
        if not records.rows:
            records = Records(name, quick=True)
        if not records.rows:
            print(f"{name}: no results; run {records.command}")
            continue
        machine = records.environment
        measured = f"`{records.command}`, {machine['processor']}, torch {machine['torch']}"
        parts += [f"## {title}", f"{measured}; commit of every row in the file."]
        parts += [sheet.markdown() for sheet in sheets(records)]
    path = write_text(Path(__file__).resolve().parents[1] / "docs" / "papers.md", "\n\n".join(parts) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
