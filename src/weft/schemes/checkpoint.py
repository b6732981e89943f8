"""Checkpoints: a run's last complete state in one file, from which the same command goes on.

It is a safetensors file: the tensors under running numbers, and in its metadata one JSON text in which a
tensor stands as {"tensor": number}, a tuple as {"tuple": [...]} and a dictionary as {"items": [[key, value],
...]}. It is written beside its place and renamed, so that a run killed at any moment leaves the one before
whole.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weft import checks
from weft.schemes.log import Log
from weft.schemes.processes import writes_files
from weft.storage import write_beside
from weft.structures import from_json
from weft.structures.base import StructuredMatrix

FILE = "checkpoint.safetensors"
LOG = "log.jsonl"
_REMEDY = "remove the folder to start anew"


class Checkpoint:
    """A folder that holds the last complete state of a run.

    A scheme of several stages keeps its own state in `outer`; the training loop writes it along with its own
    state and the log's place at every checkpoint, and takes its own state back by `take` when it is called
    again.

    Args:
        folder: made if missing; its parent must exist.
        run: what the run is, JSON-ready: a checkpoint of another run is refused.
        log: where the run's log is written; in the folder where None.
        seconds: the least time between two checkpoints; 0 writes one after every step.

    Attributes:
        outer: the state of the scheme around the training loop; empty in a new run.
        log: the run's log, of a resumed run what it held when the state was written.
        resumed: whether the folder held a state.

    Raises:
        FileNotFoundError: the parent of the folder does not exist.
        ValueError: the folder holds the state of another run, or a damaged file.

    Examples:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Checkpoint(folder, {"epochs": 2}).write({"step": 3, "weight": torch.ones(2)})
        ...     again = Checkpoint(folder, {"epochs": 2})
        >>> again.resumed, again.take()
        (True, {'step': 3, 'weight': tensor([1., 1.])})
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        run: Mapping[str, Any] | None = None,
        *,
        log: str | os.PathLike[str] | None = None,
        seconds: float = 30.0,
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.absolute().parent.is_dir():
            remedy = "create the folder's parent first"
            raise FileNotFoundError(checks.fault("checkpoint", "in an existing folder", folder, remedy))
        self.folder.mkdir(exist_ok=True)
        if writes_files():
            for part in self.folder.glob(f".{FILE}.*.part"):  # what a killed run was writing
                part.unlink(missing_ok=True)
        self.run = json.loads(json.dumps(dict(run or {})))  # as it will be read back
        self.seconds = seconds
        self.log = Log(self.folder / LOG if log is None else log)
        self.outer: dict[str, Any] = {}
        self._inner: Any = None
        self._written = time.monotonic()
        self.resumed = self.file.is_file()
        if self.resumed:
            self._read()

    @property
    def file(self) -> Path:
        """Where the state lies."""
        return self.folder / FILE

    def _read(self) -> None:
        held = read_state(self.file)
        if held["run"] != self.run:
            differing = sorted(
                name for name in {*held["run"], *self.run} if held["run"].get(name) != self.run.get(name)
            )
            got = "; ".join(
                f"{name} {held['run'].get(name)!r} there, {self.run.get(name)!r} here" for name in differing
            )
            remedy = f"give the same options, or {_REMEDY}"
            raise ValueError(checks.fault(f"checkpoint {self.folder}", "one of this run", got, remedy))
        self.outer, self._inner = held["outer"], held["inner"]
        self.log.rewind(held["log"])

    @property
    def within(self) -> bool:
        """Whether a training was interrupted in its middle: its state waits to be taken."""
        return self._inner is not None

    def take(self) -> Any:
        """The training loop's state, once.

        Returns:
            What `write` was given; None in a new run, and when it was taken already.
        """
        inner, self._inner = self._inner, None
        return inner

    def due(self) -> bool:
        """Whether enough time has passed to write again."""
        return time.monotonic() - self._written >= self.seconds

    def write(self, inner: Any = None) -> None:
        """Writes the state, complete or not at all; of several processes the first one writes.

        Args:
            inner: the training loop's part: tensors, numbers, text, None, and lists, tuples and dictionaries
                of these. None between two stages of a scheme, whose next training then starts anew.
        """
        self._written = time.monotonic()
        if not writes_files():
            return
        state = {"run": self.run, "outer": self.outer, "inner": inner, "log": self.log.position()}
        write_state(self.file, state)


class Stages:
    """A scheme's stages, each of which a run may begin at: its state is written before every stage.

    Args:
        folder: the checkpoint's; None keeps nothing.
        run: what the run is, JSON-ready.
        log: where the run's log is written; in the folder where None.
        seconds: the least time between two checkpoints within a stage.

    Attributes:
        checkpoint: for the training loop; None where nothing is kept.
        log: the run's.

    Examples:
        >>> stages = Stages(None, {})
        >>> for stage in stages.left(3, restore=lambda state: None, state=dict):
        ...     stages.log.note(stage=stage)
        >>> [entry["stage"] for entry in stages.log.entries]
        [0, 1, 2]
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        run: Mapping[str, Any],
        *,
        log: str | os.PathLike[str] | None = None,
        seconds: float = 30.0,
    ) -> None:
        self.checkpoint = None if folder is None else Checkpoint(folder, run, log=log, seconds=seconds)
        self.log = Log(log) if self.checkpoint is None else self.checkpoint.log

    @property
    def resumed(self) -> bool:
        """Whether the folder held a state."""
        return self.checkpoint is not None and self.checkpoint.resumed

    def left(
        self,
        count: int,
        *,
        restore: Callable[[Mapping[str, Any]], None],
        state: Callable[[], Mapping[str, Any]],
    ) -> Iterator[int]:
        """The stages that are left to do, counted from 0.

        Args:
            count: of all stages.
            restore: takes up what `state` gave, in a run that goes on.
            state: gives the scheme's state before a stage, and after the last one.

        Yields:
            The stages' numbers.
        """
        first = 0
        if self.checkpoint is not None and self.checkpoint.resumed:
            restore(self.checkpoint.outer)
            first = self.checkpoint.outer["stage"]
        for stage in range(first, count + 1):
            if self.checkpoint is not None and not (self.checkpoint.resumed and stage == first):
                self.checkpoint.outer = {**state(), "stage": stage}
                self.checkpoint.write()
            if stage < count:
                yield stage


def write_state(path: str | os.PathLike[str], state: Any) -> None:
    """Writes nested state into one safetensors file.

    Args:
        path: the file.
        state: tensors, numbers, text, None, and lists, tuples and dictionaries of these; anything else is a
            TypeError.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encoded(state, tensors, "state"))
    write_beside(path, lambda beside: save_file(tensors, beside, {"state": text}))


def read_state(path: str | os.PathLike[str]) -> Any:
    """Reads what `write_state` wrote.

    Args:
        path: the file.

    Returns:
        The state, its tensors on the CPU.

    Raises:
        ValueError: the file is damaged or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            text = (opened.metadata() or {})["state"]
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return _decoded(json.loads(text), tensors)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(checks.fault(str(path), "a whole checkpoint", f"'{error}'", _REMEDY)) from error


def _encoded(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()  # the file allows no aliases
        return {"tensor": name}
    if isinstance(value, list | tuple):
        items = [_encoded(item, tensors, where) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        return {
            "items": [
                [_encoded(key, tensors, where), _encoded(item, tensors, f"{where}.{key}")]
                for key, item in value.items()
            ]
        }
    remedy = "keep tensors, numbers and text in it"
    raise TypeError(
        checks.fault(where, "tensors, numbers, text and containers", type(value).__name__, remedy)
    )


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_decoded(item, tensors) for item in value["tuple"])
    return {_decoded(key, tensors): _decoded(item, tensors) for key, item in value["items"]}


def member_state(member: StructuredMatrix) -> dict[str, Any]:
    """A structured matrix as state.

    Args:
        member: any.

    Returns:
        What `member_from` takes.
    """
    return {
        "structure": member.structure.to_json(),
        "shape": list(member.shape),
        "tensors": member.stored(),
    }


def member_from(state: Mapping[str, Any]) -> StructuredMatrix:
    """The structured matrix that `member_state` described.

    Args:
        state: what it gave.

    Returns:
        An equal member.
    """
    return from_json(state["structure"]).from_tensors(tuple(state["shape"]), state["tensors"])


def described(value: Any) -> Any:
    """An option as it stands in a checkpoint's description of its run.

    Args:
        value: a number, text, None, a container of these, or a function.

    Returns:
        The value; of a function its name, since nothing else of it lasts from one process to the next.
    """
    if isinstance(value, Callable):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return [described(item) for item in value] if isinstance(value, list | tuple) else value
