"""Writes docs/papers.md: what the source papers report beside what we measure, from the results on disk.

    python experiments/papers.py

Runs nothing; run the experiments first. A figure of a paper stands in brackets or a column beside ours. Where
an experiment has been run in its reduced form alone, that is what is shown, and its command says so. At the
end stands how long the experiments took.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import denton
import giffon
import huelder
import kissel_diepold
import learning_compression
import psm_nets
from records import RESULTS, Records, Sheet
from run_all import EXPERIMENTS

from weft.storage import write_text

PAPERS: dict[str, tuple[str, Callable[[Records], Iterable[Sheet]]]] = {
    "huelder": ("Hülder: hierarchical matrices on classifier layers", huelder.sheets),
    "kissel_diepold": ("Kissel and Diepold 2022: semiseparable classifiers", kissel_diepold.sheets),
    "giffon": ("Giffon et al. 2021: PSM-nets, products of sparse matrices", giffon.page),
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

HOURS = {"quick": 2, "full": 8}


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


def times() -> Iterator[Sheet]:
    """How long the experiments took, reduced and in full."""
    path = RESULTS / "run_all_quick.json"
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        kinds = "seconds", "processor_seconds"
        rows = [(row["name"], *(_minutes(row[kind]) for kind in kinds)) for row in record["times"]]
        total = [_minutes(sum(row[kind] for row in record["times"])) for kind in kinds]
        machine = record["environment"]
        yield Sheet(
            f"The reduced form of all, `{record['command']}` from nothing, in minutes",
            ("experiment", "on the clock", "of processors"),
            [*rows, ("together", *total)],
            f"To take at most {HOURS['quick']} hours of two cores. The load of the machine's "
            f"{machine['cores']} cores was {machine['load_average']:.0f} at the end.",
        )
    rows, seconds, rest = [], 0.0, 0.0
    for experiment in EXPERIMENTS:
        count, taken = experiment.measured()
        left = taken / max(count, 1) * max(experiment.rows - count, 0)
        rows.append((
            experiment.name,
            f"{count} of {experiment.rows}" if experiment.rows else str(count),
            _minutes(taken) if taken else "not kept",
            _minutes(left) if taken else "unknown",
        ))
        seconds, rest = seconds + taken, rest + left
    yield Sheet(
        "The full form: what the rows measured so far took, in minutes",
        ("experiment", "rows", "on the clock", "expected for the rest"),
        [*rows, ("together", "", _minutes(seconds), _minutes(rest))],
        f"`make experiments` is to take at most {HOURS['full']} hours of two cores; it has not been run as a "
        "whole. The times are sums over rows, without the reference networks' training, measured one thread "
        "at a time while other work shared the two cores: on the clock they are several times the "
        "processor's. What is expected takes the rows that are missing for average ones.",
    )


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
    parts += ["## How long the experiments take", *(sheet.markdown() for sheet in times())]
    path = write_text(Path(__file__).resolve().parents[1] / "docs" / "papers.md", "\n\n".join(parts) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
