"""Error curves kept on disk, by the content of what they were computed from."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import weft.numerics
import weft.structures
from weft.storage import read_json, write_text
from weft.structures import from_json
from weft.structures.base import Candidate, Cost, Geometry, Gram, Structure


def default_folder() -> Path:
    """Where the command line keeps curves and latencies between runs.

    Returns:
        The folder that the environment variable WEFT_CACHE names, else `weft` in the user's cache folder.
    """
    chosen = os.environ.get("WEFT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft"


class CurveCache:
    """A folder of error curves.

    A curve's key is a hash of weight, Grams, geometry, the family's ladder and the code of all families and
    algorithms: whatever could change the curve gives it another name, so nothing ever has to be invalidated.

    Args:
        folder: created where it does not exist.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder) / "curves"
        self.folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def key(content: str, family: type[Structure], ladder: Sequence[Structure]) -> str:
        """The name of a curve.

        Args:
            content: what the layer consists of, from `layer_digest`.
            family: whose curve.
            ladder: its candidates.

        Returns:
            A hexadecimal number.
        """
        parts = (
            _code_digest(),
            content,
            f"{family.__module__}.{family.__qualname__}",
            json.dumps([structure.to_json() for structure in ladder]),
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def load(self, key: str) -> list[Candidate] | None:
        """A curve, if it is kept.

        Args:
            key: its name.

        Returns:
            The candidates; None where there are none or the file is damaged: a cache may be lost.
        """
        try:
            data = read_json(self._path(key), "weft_curve", "")
            return [
                Candidate(from_json(point["structure"]), Cost(**point["cost"]), float(point["error"]))
                for point in data["points"]
            ]
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def save(self, key: str, curve: Sequence[Candidate]) -> None:
        """Keeps a curve.

        Args:
            key: its name.
            curve: the candidates.
        """
        points = [
            {"structure": point.structure.to_json(), "cost": asdict(point.cost), "error": point.error}
            for point in curve
        ]
        write_text(self._path(key), json.dumps({"weft_curve": 1, "points": points}))

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def layer_digest(
    weight: Tensor, input_gram: Gram | None, output_gram: Gram | None, geometry: Geometry | None
) -> str:
    """A hash of what a layer's curves depend on, whatever the family.

    Args:
        weight: W.
        input_gram: Ĝ.
        output_gram: H.
        geometry: the convolution's.

    Returns:
        A hexadecimal number.
    """
    parts = (
        str(weight.dtype),
        str(tuple(weight.shape)),
        "" if input_gram is None else input_gram.digest(),
        "" if output_gram is None else output_gram.digest(),
        "" if geometry is None else json.dumps(asdict(geometry)),
    )
    content = hashlib.sha256("\n".join(parts).encode())
    content.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()


@functools.cache
def _code_digest() -> str:
    """A hash of the code that curves come from."""
    content = hashlib.sha256()
    for package in (weft.numerics, weft.structures):
        for folder in package.__path__:
            for file in sorted(Path(folder).rglob("*.py")):
                content.update(file.read_bytes())
    return content.hexdigest()
