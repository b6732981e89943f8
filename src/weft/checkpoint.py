"""Checkpoints of safetensors files, as Hugging Face writes them, read one tensor at a time.

A checkpoint is a folder with `model.safetensors.index.json` and the shards that it names, or with a single
file. No model object is needed, and nothing stays in memory.
"""

import ctypes
import fnmatch
import json
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weft import checks

INDEX = "model.safetensors.index.json"
WEIGHTS = "*.weight"  # what names a layer's weight in PyTorch

# The dtypes in which weights can be compressed; tensors of others are copied.
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AGAIN = "download, copy or write it again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file.

    Attributes:
        name: its name.
        file: the file.
        kind: its dtype in safetensors' words, such as "BF16".
        shape: its shape.
        offset: where its bytes begin in the file.
        nbytes: how many there are.
    """

    name: str
    file: Path
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype; None where it is none that can be compressed."""
        return _FLOATS.get(self.kind)

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        safetensors maps the whole file for every tensor, privately: a process whose memory is bounded would
        be refused a small part of a large shard.

        Returns:
            The tensor.

        Raises:
            ValueError: the file has become shorter.
        """
        if self.dtype is None:
            with opened(self.file) as inside:
                return inside.get_tensor(self.name)
        _trim()
        content = torch.empty(self.nbytes, dtype=torch.uint8)
        with self.file.open("rb") as file:
            file.seek(self.offset)
            count = file.readinto(content.numpy().data)
        if count != self.nbytes:
            expected = f"of {self.nbytes} bytes"
            raise ValueError(checks.fault(f"{self.name} in {self.file}", expected, count, _AGAIN))
        return content.view(self.dtype).reshape(self.shape)


def _trim() -> None:
    """Gives freed memory back: glibc keeps blocks of up to 32 MiB, and over many layers they add up."""
    if os.name == "nt":  # there None names no library
        return
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)


@contextmanager
def opened(file: Path) -> Generator[Any]:
    """Opens a safetensors file that must be whole.

    Args:
        file: its path.

    Yields:
        What safetensors gives.

    Raises:
        ValueError: it is truncated, or no such file at all.
    """
    try:
        with safe_open(file, framework="pt") as inside:
            yield inside
    except SafetensorError as error:
        expected = "a whole safetensors file"
        raise ValueError(checks.fault(str(file), expected, f"'{error}'", _AGAIN)) from error


class Checkpoint:
    """The tensors of a folder of shards.

    Args:
        folder: the folder, its index, or a single safetensors file.

    Raises:
        FileNotFoundError: there is no such folder or file, or a shard that the index names is missing.
        ValueError: the folder has no index and not exactly one file, the index is damaged, a shard is
            truncated or does not hold what the index says, or it is compressed already.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder)
        places = self._places()
        self.tensors: dict[str, StoredTensor] = {}
        for file in dict.fromkeys(places.values()) if isinstance(places, dict) else [places]:
            with opened(file) as inside:
                if (inside.metadata() or {}).get("format") == "weft":
                    remedy = "give the dense network's checkpoint"
                    raise ValueError(checks.fault(str(file), "dense", "one that weft wrote", remedy))
                held = inside.offset_keys()
                if isinstance(places, dict):
                    listed = [name for name, own in places.items() if own == file]
                    parts = checks.missing_and_surplus(held, listed)
                    if parts:
                        expected, got = f"what {INDEX} says", "; ".join(parts)
                        raise ValueError(checks.fault(f"tensors of {file}", expected, got, _AGAIN))
            self.tensors |= _stored(file, held)

    def _places(self) -> dict[str, Path] | Path:
        """The file of every tensor that the index lists, or the one file that there is."""
        index = self.path / INDEX if self.path.is_dir() else self.path
        if index.suffix == ".json" and index.is_file():
            return listed(index)
        if self.path.is_file():
            return self.path
        remedy = f"give a folder with {INDEX}, or with one file"
        if not self.path.is_dir():
            raise FileNotFoundError(checks.fault("shards", "an existing folder", self.path, remedy))
        files = sorted(self.path.glob("*.safetensors"))
        if len(files) != 1:
            got = f"{len(files)} files without an index in {self.path}"
            raise ValueError(checks.fault("shards", "one file or an index", got, remedy))
        return files[0]

    def layers(self, pattern: str = WEIGHTS) -> tuple[dict[str, StoredTensor], dict[str, str]]:
        """Which tensors are the weights of layers, and why others with such a name stay dense.

        Args:
            pattern: their names; a layer's is the name without the last part.

        Returns:
            Weights by layer name, and reasons by layer name. A weight of one axis is no layer's and is in
            neither.
        """
        found: dict[str, StoredTensor] = {}
        left: dict[str, str] = {}
        for name, tensor in self.tensors.items():
            if len(tensor.shape) < 2 or not fnmatch.fnmatchcase(name, pattern):
                continue
            layer = name.rpartition(".")[0]
            if tensor.dtype is None:
                left[layer] = f"its weight is {tensor.kind}"
            elif len(tensor.shape) not in {2, 4}:
                left[layer] = f"its weight has {len(tensor.shape)} axes"
            elif 0 in tensor.shape:
                left[layer] = f"its weight is empty: {tensor.shape}"
            elif len(tensor.shape) == 4 and tensor.shape[1] == 1:
                left[layer] = "its channels have a kernel each (depthwise)"
            else:
                found[layer] = tensor
        return found, left


def _stored(file: Path, names: Iterable[str]) -> dict[str, StoredTensor]:
    """Where the tensors of a whole file lie: its header is JSON behind its own length in eight bytes."""
    with file.open("rb") as opened_file:
        size = int.from_bytes(opened_file.read(8), "little")
        header = json.loads(opened_file.read(size))
    found = {}
    for name in names:
        entry = header[name]
        first, last = entry["data_offsets"]
        shape = tuple(entry["shape"])
        found[name] = StoredTensor(name, file, entry["dtype"], shape, 8 + size + first, last - first)
    return found


def listed(index: Path) -> dict[str, Path]:
    """Where an index says that tensors are.

    Args:
        index: the JSON file.

    Returns:
        Files that exist, by tensor.

    Raises:
        FileNotFoundError: one of them does not.
        ValueError: it is no index.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        places = {name: index.parent / Path(file).name for name, file in weight_map.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        expected = 'JSON with a "weight_map" of tensors to files'
        raise ValueError(checks.fault(str(index), expected, f"'{error!r}'", _AGAIN)) from error
    for name, file in places.items():
        if not file.is_file():
            got = f"none, and {name} is in it"
            raise FileNotFoundError(checks.fault(f"shard {file}", "a file that exists", got, _AGAIN))
    return places
