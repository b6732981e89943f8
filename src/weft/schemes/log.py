"""The one log of every scheme: dictionaries in memory, JSON lines on disk."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft import checks
from weft.schemes.processes import writes_files


class Log:
    """What a run did, in its order.

    An entry of a training step holds step, epoch, loss, size (bytes of the network) and seconds since the run
    began, interruptions left out; an evaluation has metric in place of loss. Schemes add fields of their own.
    A line is in the file as soon as it is written; of several processes the first one writes.

    Args:
        path: the file, written anew unless the log is rewound to a place in it; None for none.

    Attributes:
        entries: all entries, JSON-ready.
        steps: optimiser steps so far.

    Raises:
        FileNotFoundError: the file's folder does not exist.

    Examples:
        >>> log = Log()
        >>> log.step(epoch=0, loss=0.5)
        >>> log.note(metric=0.9)
        >>> [(entry["step"], sorted(entry)) for entry in log.entries]
        [(0, ['epoch', 'loss', 'seconds', 'step']), (1, ['metric', 'seconds', 'step'])]
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.entries: list[dict[str, Any]] = []
        self.steps = 0
        self.path = None if path is None else Path(path)
        self._file: Any = None
        self._before = 0.0
        self._start = time.perf_counter()
        if self.path is not None and not self.path.parent.is_dir():
            remedy = "create the folder first"
            raise FileNotFoundError(checks.fault("log", "in an existing folder", self.path, remedy))

    @property
    def seconds(self) -> float:
        """How long the run has gone on, interruptions left out."""
        return self._before + time.perf_counter() - self._start

    def step(self, **entry: Any) -> None:
        """Writes what one optimiser step did.

        Args:
            **entry: JSON-ready values by name.
        """
        self.note(**entry)
        self.steps += 1

    def note(self, **entry: Any) -> None:
        """Writes what happened between two steps.

        Args:
            **entry: JSON-ready values by name.
        """
        full = {"step": self.steps, **entry, "seconds": round(self.seconds, 6)}
        self.entries.append(full)
        if self.path is not None and writes_files():
            if self._file is None:
                self._file = self.path.open("wb")
            self._file.write(json.dumps(full).encode() + b"\n")
            self._file.flush()

    def position(self) -> dict[str, Any]:
        """Where the log stands, for a checkpoint.

        Returns:
            Numbers for `rewind`, and the entries themselves where no file holds them.
        """
        place: dict[str, Any] = {"steps": self.steps, "seconds": self.seconds}
        if self.path is None:
            return {**place, "entries": self.entries}
        return {**place, "bytes": 0 if self._file is None else self._file.tell()}

    def rewind(self, position: Mapping[str, Any]) -> None:
        """Goes back to where the log stood when a checkpoint was written; what came after it is dropped.

        Args:
            position: what `position` gave.

        Raises:
            ValueError: the file does not hold what the checkpoint says.
        """
        self.steps, self._before = position["steps"], position["seconds"]
        self._start = time.perf_counter()
        if self.path is None or "entries" in position:
            self.entries = list(position.get("entries", []))
            return
        size = position["bytes"]
        held = self.path.stat().st_size if self.path.is_file() else 0
        if held < size:
            remedy = "put it back, or start anew in another checkpoint folder"
            raise ValueError(checks.fault(str(self.path), f"at least {size} bytes long", held, remedy))
        if self._file is not None:
            self._file.close()
        kept = self.path.read_bytes()[:size] if held else b""
        self.entries = [json.loads(line) for line in kept.splitlines()]
        if writes_files():
            self._file = self.path.open("r+b" if held else "w+b")
            self._file.truncate(size)
            self._file.seek(size)


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the log of a run, also of one that is still going on.

    Args:
        path: a file of JSON lines.

    Returns:
        Its entries.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no JSON dictionary.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(checks.fault("log", "an existing file", file, "write it with --log"))
    whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")  # a line that is being written has no end
    entries = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        if not isinstance(entry, dict):
            remedy = "give a log that weft wrote"
            raise ValueError(checks.fault(f"line {number} of {file}", "a JSON dictionary", line[:40], remedy))
        entries.append(entry)
    return entries
