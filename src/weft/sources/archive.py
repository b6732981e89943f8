"""Reads named arrays from npz files, never through pickle."""

import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weft.checks import fault
from weft.sources.reference import existing_file, first_line


def read_arrays(
    argument: str, path: str | Path, names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """Reads the arrays of an npz file.

    Args:
        argument: what the file is called in errors.
        path: the file.
        names: which arrays to read where they are present; None for all.

    Returns:
        The arrays by name, in the file's order.

    Raises:
        ValueError: the file is truncated, is no npz file, or holds pickled objects.
    """
    path = existing_file(argument, path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError(
                    fault(argument, "an npz file", f"a single array in {path}", "save it with numpy.savez")
                )
            return {name: archive[name] for name in archive.files if names is None or name in names}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        got = f"{path} ({first_line(error)})"
        raise ValueError(fault(argument, "a complete npz file", got, "copy or download it again")) from error
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        # numpy says this both of object arrays and of a file that is no archive at all
        got = f"{path}, which is no npz file or holds pickled objects"
        remedy = "save plain numeric arrays with numpy.savez"
        raise ValueError(fault(argument, "an npz file of plain arrays", got, remedy)) from error


def numeric_tensor(argument: str, array: np.ndarray) -> Tensor:
    """Turns a numpy array into a tensor.

    Args:
        argument: what the array is called in errors.
        array: numbers of any type that torch knows.

    Returns:
        The tensor, sharing memory where numpy and torch allow.

    Raises:
        TypeError: the array does not hold numbers.
    """
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        return torch.from_numpy(native if native.flags.writeable else native.copy())
    except TypeError as error:
        raise TypeError(
            fault(argument, "an array of numbers", f"dtype {array.dtype}", "convert it")
        ) from error
