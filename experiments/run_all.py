"""Every experiment in turn: what is finished is skipped, what was interrupted goes on.

    python experiments/run_all.py                 # in full: make experiments
    python experiments/run_all.py --quick         # a reduced form of every table: make experiments-quick
    python experiments/run_all.py --list
    python experiments/run_all.py huelder giffon  # some of them

An experiment whose data or packages are absent says so and is passed over. The output of each goes to
build/experiments/NAME.log. Reduced forms write files of their own (NAME_quick.json) and never touch the full
ones. At the end docs/papers.md is written anew from the results. Exit status 1 where an experiment failed.

How long each took, on the clock and of processors, goes to results/run_all.json or run_all_quick.json, where
the whole was run and no experiment had any result to go on from.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from weft.bench import surroundings
from weft.storage import write_text

HERE = Path(__file__).parent
LOGS = HERE.parent / "build" / "experiments"


@dataclass(frozen=True)
class Experiment:
    """A script as it is run.

    Attributes:
        script: its name without the ending.
        arguments: what it is given.
        by_row: whether it keeps its finished rows; else its results file says that it is finished.
        rows: how many it has in full, where it keeps them.
        quick: whether it has a reduced form; one without belongs to no paper's table and runs in full only.
    """

    script: str
    arguments: tuple[str, ...] = ()
    by_row: bool = True
    quick: bool = True
    rows: int = 0

    @property
    def name(self) -> str:
        return "_".join((self.script, *self.arguments))

    def command(self, quick: bool) -> list[str]:
        return [
            sys.executable,
            str(HERE / f"{self.script}.py"),
            *self.arguments,
            *(["--quick"] if quick else []),
        ]

    def results(self, quick: bool) -> Path:
        """The file that it writes."""
        return HERE / "results" / f"{self.name}{'_quick' if quick else ''}.json"

    def finished(self) -> bool:
        """Whether nothing is left to do, as far as can be told without running it."""
        return not self.by_row and self.results(quick=False).exists()

    def measured(self) -> tuple[int, float]:
        """How many rows its full form has so far, and the seconds that they took, where they say it."""
        path = self.results(quick=False)
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        rows = found.get("rows", [])
        return len(rows), found.get("seconds", 0) + sum(row.get("seconds_taken") or 0 for row in rows)


# The cheap ones first, so that an interrupted run has most tables.
EXPERIMENTS = (
    Experiment("denton", rows=20),
    Experiment("huelder", rows=75),
    Experiment("kissel_diepold", rows=173),
    Experiment("giffon", rows=168),
    Experiment("psm_nets", rows=5),
    Experiment("learning_compression", rows=22),
    Experiment("accuracy_by_rank", ("mnist",), by_row=False, quick=False),
    Experiment("accuracy_by_rank", ("mobilenet_v2",), by_row=False, quick=False),
    Experiment("accuracy_by_rank", ("resnet20",), by_row=False, quick=False),
    Experiment("three_families", by_row=False, quick=False),
    Experiment("pruning", by_row=False, quick=False),
    Experiment("quantisation", by_row=False, quick=False),
    Experiment("deep_compression", by_row=False, quick=False),
    Experiment("bytes_frontier", quick=False, rows=45),
    Experiment("resnet20_convolutions", by_row=False, quick=False),
    Experiment("planner", rows=42),
)


def run(experiment: Experiment, quick: bool) -> tuple[str, float, float]:
    """Runs one experiment; what became of it, and the seconds that it took: the clock's, the processors'."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{experiment.name}{'_quick' if quick else ''}.log"
    started, before = time.perf_counter(), os.times()
    # Both cores for one experiment at a time: timings inside them need the machine for themselves.
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            experiment.command(quick),
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=HERE.parent,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            check=False,
        )
    seconds, after = time.perf_counter() - started, os.times()
    processor = sum(after[2:4]) - sum(before[2:4])  # the children's, in user mode and in the kernel's
    if done.returncode:
        return f"failed: see {log}", seconds, processor
    skipped = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("skipped:")]
    return skipped[0] if skipped else "done", seconds, processor


def write_times(times: list[dict[str, Any]], quick: bool) -> None:
    """Keeps how long a whole run took."""
    record = {
        "experiment": "run_all",
        "command": f"python experiments/run_all.py{' --quick' if quick else ''}",
        "environment": surroundings(),
        "times": times,
    }
    path = HERE / "results" / f"run_all{'_quick' if quick else ''}.json"
    write_text(path, json.dumps(record, indent=1) + "\n")


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list(dict.fromkeys(experiment.script for experiment in EXPERIMENTS))
    options.add_argument("script", nargs="*", choices=[*known, []], help="only these")
    options.add_argument("--quick", action="store_true", help="a reduced form of those that have one")
    options.add_argument("--list", action="store_true", help="say what would run")
    given = options.parse_args()
    chosen = [
        experiment
        for experiment in EXPERIMENTS
        if (not given.script or experiment.script in given.script) and (experiment.quick or not given.quick)
    ]
    if given.list:
        for experiment in chosen:
            rows, _ = experiment.measured()
            so_far = f"({rows} of {experiment.rows} rows)" if experiment.by_row and not given.quick else ""
            said = "(finished)" if experiment.finished() and not given.quick else so_far
            print(" ".join(experiment.command(given.quick)[1:]), said)
        return
    anew = not given.script and not any(experiment.results(given.quick).exists() for experiment in chosen)
    times = []
    table = Table(title="experiments", title_justify="left")
    for heading in ("experiment", "seconds", "processor's", "result"):
        table.add_column(heading, overflow="fold")
    failed = False
    for experiment in chosen:
        if experiment.finished() and not given.quick:
            table.add_row(experiment.name, "", "", "finished before; remove its results to run it again")
            continue
        print(f"{experiment.name} ...", flush=True)
        result, seconds, processor = run(experiment, given.quick)
        failed = failed or result.startswith("failed")
        print(f"{experiment.name}: {result} ({seconds:.0f} s)", flush=True)
        table.add_row(experiment.name, f"{seconds:.0f}", f"{processor:.0f}", result)
        times.append({
            "name": experiment.name,
            "seconds": seconds,
            "processor_seconds": processor,
            "result": result,
        })
    if anew and not failed:
        write_times(times, given.quick)
    if not given.quick and not given.script:
        result, *_ = run(Experiment("papers"), quick=False)
        failed = failed or result.startswith("failed")
        table.add_row("docs/papers.md", "", "", result)
    Console().print(table)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
