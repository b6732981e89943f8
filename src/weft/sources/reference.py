"""Source strings: `prefix:place?option=value`, and `path/to/file.py:function`.

A source says where a model or a data set comes from, on the command line and in the files that weft writes:

    torchvision:resnet18?random          prefix `torchvision`, place `resnet18`, option `random` = ""
    imagefolder:photos?size=160&workers=2
    experiments/models.py:resnet20       a function in the user's own file, called without arguments
"""

import importlib
import importlib.util
import sys
import zlib
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from weft.checks import fault

FILE_PREFIX = "file.py"
"""The prefix under which `path/to/file.py:function` is dispatched; it is never written in a source."""


@dataclass(frozen=True)
class Reference:
    """A source string taken apart.

    Attributes:
        source: the string itself.
        prefix: what stands before the first colon; `FILE_PREFIX` for `path/to/file.py:function`.
        place: what stands between the prefix and the options.
        given_options: the options as they were written.
    """

    source: str
    prefix: str
    place: str
    given_options: Mapping[str, str]

    def options(self, known: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
        """Reads the options.

        Args:
            known: for every option that this prefix understands, the function that reads its value.

        Returns:
            The options that were given, with their values read.

        Raises:
            ValueError: an option is not known or its value cannot be read.

        Examples:
            >>> parse("source", "imagefolder:photos?size=160", ["imagefolder"]).options({"size": int})
            {'size': 160}
        """
        values: dict[str, Any] = {}
        for name, text in self.given_options.items():
            if name not in known:
                expected = f"among {', '.join(sorted(known))}" if known else "absent"
                remedy = f"see the options of {self.prefix}: sources"
                raise ValueError(fault(f"options of {self.source!r}", expected, repr(name), remedy))
            try:
                values[name] = known[name](text)
            except ValueError as error:
                argument = f"option {name} of {self.source!r}"
                raise ValueError(
                    fault(argument, "a readable value", repr(text), f"write it differently ({error})")
                ) from error
        return values


def parse(argument: str, source: object, prefixes: Collection[str]) -> Reference:
    """Takes a source string apart.

    Args:
        argument: what the source is called in errors.
        source: the source string.
        prefixes: the known prefixes; `FILE_PREFIX` among them allows `path/to/file.py:function`. A prefix
            without a place (such as `digits`) is written without a colon.

    Returns:
        The parts.

    Raises:
        TypeError: the source is no string.
        ValueError: the prefix is unknown, or a file is named without a function.

    Examples:
        >>> parse("model", "nets/small.py:make", [FILE_PREFIX]).place
        'nets/small.py:make'
        >>> parse("model", "torchvison:resnet18", ["timm", "torchvision"])
        Traceback (most recent call last):
        ValueError: model must be one of timm:..., torchvision:..., got 'torchvison:resnet18';
        check its spelling
    """
    if not isinstance(source, str):
        raise TypeError(fault(argument, "a source string", type(source).__name__, 'write e.g. "digits"'))
    path, colon, function = source.rpartition(":")
    if FILE_PREFIX in prefixes and colon and path.endswith(".py"):
        return Reference(source, FILE_PREFIX, source, {})
    if FILE_PREFIX in prefixes and function.endswith(".py"):
        raise ValueError(
            fault(argument, "path/to/file.py:function", repr(source), "name the function after a colon")
        )
    written, _, query = source.partition("?")
    prefix, _, place = written.partition(":")
    if prefix not in prefixes or prefix == FILE_PREFIX:
        named = [f"{known}:..." for known in sorted(set(prefixes) - {FILE_PREFIX, "digits"})]
        named += ["digits"] if "digits" in prefixes else []
        named += ["path/to/file.py:function"] if FILE_PREFIX in prefixes else []
        raise ValueError(fault(argument, f"one of {', '.join(named)}", repr(source), "check its spelling"))
    options = (item.partition("=") for item in query.split("&") if item)
    return Reference(source, prefix, place, {name: value for name, _, value in options})


def existing_file(argument: str, path: str | Path) -> Path:
    """Checks that a file is there.

    Args:
        argument: what the file is called in errors.
        path: its path.

    Returns:
        The path.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        got = f"the folder {path}" if path.is_dir() else f"no file at {path}"
        raise FileNotFoundError(fault(argument, "an existing file", got, "check the path"))
    return path


def existing_folder(argument: str, path: str | Path) -> Path:
    """Checks that a folder is there.

    Args:
        argument: what the folder is called in errors.
        path: its path; empty where the source named none.

    Returns:
        The path.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not str(path) or not Path(path).is_dir():
        got = f"no folder at {path}" if str(path) else "no folder named"
        raise FileNotFoundError(fault(argument, "an existing folder", got, "check the path"))
    return Path(path)


def optional_package(name: str, extra: str) -> ModuleType:
    """Imports a package that weft does not need by itself.

    Args:
        name: the module to import.
        extra: the extra of weft that installs it.

    Returns:
        The imported module.

    Raises:
        ImportError: the package is not installed, or it does not import beside this torch.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        got = f"no module named {error.name}"
        remedy = f"run: pip install 'weft[{extra}]'"
        raise ImportError(fault(f"package {name}", "installed for this source", got, remedy)) from error
    except (ImportError, RuntimeError, OSError) as error:  # a build for another torch fails at import
        got = f"{type(error).__name__}: {first_line(error)}"
        remedy = f"install the build of {name} that fits torch {torch.__version__}"
        raise ImportError(fault(f"package {name}", "importable for this source", got, remedy)) from error


def first_line(error: BaseException) -> str:
    r"""Shortens an error's text to its first line, for use within another error.

    Args:
        error: the error.

    Returns:
        Its first line, or its type's name where it says nothing.

    Examples:
        >>> first_line(OSError("no route to host\nwhile asking"))
        'no route to host'
    """
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def call_function(argument: str, reference: Reference) -> object:
    """Executes the file of `path/to/file.py:function` and calls the function without arguments.

    The file's own folder is importable while the file is executed and while the function runs, so that it can
    import its neighbours. Each call executes the file anew. An error raised inside the user's code passes
    through unchanged, with a note that says which source was being loaded.

    Args:
        argument: what the source is called in errors.
        reference: a reference with prefix `FILE_PREFIX`.

    Returns:
        What the function returned.

    Raises:
        ValueError: the file has no such function.
    """
    path_text, _, name = reference.place.rpartition(":")
    path = existing_file(argument, path_text).resolve()
    with _importable(path.parent):
        try:
            module = _execute(path)
            function = vars(module).get(name)
            if not callable(function):
                own = [
                    key
                    for key, value in vars(module).items()
                    if callable(value) and getattr(value, "__module__", None) == module.__name__
                ]
                got = (
                    f"{name!r}, which {path.name} lacks"
                    if function is None
                    else f"{name!r}, which cannot be called"
                )
                expected = f"the name of a function in {path.name}"
                remedy = f"choose one of {', '.join(sorted(own))}" if own else "define it there"
                raise ValueError(fault(argument, expected, got, remedy))
            return function()
        except Exception as error:
            error.add_note(f"while loading {reference.source}")
            raise


def _execute(path: Path) -> ModuleType:
    # The name carries the path, so that two files with the same name live side by side in sys.modules, where
    # dataclasses, pickle and torch.compile look a class's module up.
    name = f"weft_source_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(fault("file", "a Python source file", str(path), "name a .py file"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _importable(folder: Path) -> Generator[None, None, None]:
    # A neighbour imported from another source's folder under the same name must not answer for this folder's
    # own.
    for name, module in list(sys.modules.items()):
        marked = vars(module).get("__weft_source_folder__", folder)
        shadowed = (folder / f"{name}.py").is_file() or (folder / name).is_dir()
        if marked != folder and shadowed:
            del sys.modules[name]
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).resolve().is_relative_to(folder):
                vars(sys.modules[name])["__weft_source_folder__"] = folder
