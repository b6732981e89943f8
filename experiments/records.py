"""Results of an experiment, row by row, kept as soon as they are known: a run that was killed goes on.

    records = Records("huelder")
    row = records.row("time", {"rank": 30, "method": "svd"}, measure)   # measured now, or read from the file

The file is experiments/results/NAME.json; every row says which part it belongs to, its setting, the seed, the
commit, and how long it took: seconds on the clock, and the processor's, which others on the machine change
less.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from weft.bench import commit, surroundings
from weft.storage import write_text

RESULTS = Path(__file__).parent / "results"


class Records:
    """The rows of one experiment.

    Args:
        name: the experiment's, and its file's.
        fresh: computes rows again that the file has.
        quick: whether this is the reduced form; its rows lie in a file of their own.
        packages: whose versions belong to the results.
    """

    def __init__(
        self, name: str, *, fresh: bool = False, quick: bool = False, packages: tuple[str, ...] = ()
    ) -> None:
        self.name, self.packages = name, packages
        self.path = RESULTS / f"{name}{'_quick' if quick else ''}.json"
        self.command = f"python experiments/{name}.py{' --quick' if quick else ''}"
        before = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.environment: dict[str, Any] = before.get("environment", {})
        self.rows: list[dict[str, Any]] = [] if fresh else before.get("rows", [])

    def row(
        self,
        part: str,
        setting: Mapping[str, Any],
        compute: Callable[[], Mapping[str, Any]],
        *,
        seed: int = 0,
    ) -> dict[str, Any]:
        """The row of a setting, computed where the file has none.

        Args:
            part: the table or figure.
            setting: what identifies the row in it; JSON-ready.
            compute: gives the row's values; JSON-ready.
            seed: of this row.

        Returns:
            Part, setting and values.
        """
        key = {"part": part, **json.loads(json.dumps(setting)), "seed": seed}
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        start, processor = time.perf_counter(), time.process_time()
        found = json.loads(json.dumps({**key, **compute()}))
        found |= {
            "seconds_taken": time.perf_counter() - start,
            "processor_seconds": time.process_time() - processor,
            "commit": commit(),
        }
        self.rows.append(found)
        self.environment = surroundings(*self.packages)
        record = {
            "experiment": self.name,
            "command": self.command,
            "environment": self.environment,
            "rows": self.rows,
        }
        RESULTS.mkdir(exist_ok=True)
        write_text(self.path, json.dumps(record, indent=1) + "\n")
        return found

    def of(self, part: str) -> list[dict[str, Any]]:
        """The rows of a part, in the order in which they were made."""
        return [row for row in self.rows if row["part"] == part]


@dataclass(frozen=True)
class Sheet:
    """A table of a paper as we measure it.

    Attributes:
        title: what it shows.
        headings: of the columns.
        rows: their cells as text.
        remark: why the figures differ from those published.
    """

    title: str
    headings: Sequence[str]
    rows: Iterable[Sequence[str]]
    remark: str = ""

    def markdown(self) -> str:
        """The table as GitHub shows it."""
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return "\n\n".join(filter(None, [f"### {self.title}", table, self.remark]))


def show(sheets: Iterable[Sheet]) -> None:
    """Prints tables."""
    for sheet in sheets:
        table = Table(title=sheet.title, title_justify="left", caption=sheet.remark, caption_justify="left")
        for heading in sheet.headings:
            table.add_column(heading, overflow="fold")
        for row in sheet.rows:
            table.add_row(*row)
        Console(width=130).print(table)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that experiments share: --fresh and --quick."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--fresh", action="store_true", help="compute every row again")
    options.add_argument("--quick", action="store_true", help="a reduced form, into a file of its own")
    return options
