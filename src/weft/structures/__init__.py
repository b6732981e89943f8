"""The families: this folder is the registry.

Every module here but `base` holds one family. `families()` finds them, together with those that other
packages register in the entry-point group `weft.structures`; the command line, JSON, documentation tables,
planner, layers and schemes get families only from there.
"""

import ast
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from weft import checks
from weft.structures.base import Structure

ENTRY_POINTS = "weft.structures"


@functools.cache
def families() -> dict[str, type[Structure]]:
    """All families by class name: the modules of this folder, then other packages' entry points.

    Returns:
        Names in alphabetical order.

    Raises:
        TypeError: a module or entry point does not hold exactly one family.
        ValueError: two families have the same name.

    Examples:
        >>> "LowRank" in families()
        True
    """
    found: list[type[Structure]] = []
    for module in pkgutil.iter_modules(__path__):
        if module.name != "base":
            found.append(_only_family(f"{__name__}.{module.name}"))
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        family = entry.load()
        if not (inspect.isclass(family) and issubclass(family, Structure)):
            remedy = "let the entry point name the class, e.g. package.module:Family"
            raise TypeError(checks.fault(f"entry point {entry.name}", "a Structure", repr(family), remedy))
        found.append(family)
    named: dict[str, type[Structure]] = {}
    for family in sorted(found, key=lambda family: family.__name__):
        if family.__name__ in named:
            got = f"{family.__name__} twice"
            raise ValueError(checks.fault("family names", "unique", got, "rename or uninstall one"))
        named[family.__name__] = family
    return named


def _only_family(module_name: str) -> type[Structure]:
    module = importlib.import_module(module_name)
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Structure)
        and not inspect.isabstract(value)
        and value.__module__ == module_name
    ]
    if len(own) != 1:
        got = ", ".join(value.__name__ for value in own) or "none"
        raise TypeError(checks.fault(f"families in {module_name}", "exactly one", got, "one family per file"))
    return own[0]


def family(name: str) -> type[Structure]:
    """One family by class name.

    Args:
        name: such as "LowRank".

    Returns:
        The class.

    Raises:
        ValueError: no family has this name.
    """
    known = families()
    if name not in known:
        near = {other.lower(): other for other in known}.get(name.lower().replace("_", ""))
        remedy = "check the spelling" if near is None else f"write {near}"
        raise ValueError(checks.fault("family", f"one of {', '.join(known)}", repr(name), remedy))
    return known[name]


def select(wanted: str | Iterable[str | type[Structure]]) -> list[type[Structure]]:
    """The families meant by "all", by names, or by classes.

    Args:
        wanted: "all", one name, names separated by commas, or an iterable of names and classes.

    Returns:
        The classes, each once, in the order given.

    Raises:
        ValueError: a name is unknown or nothing is named.
        TypeError: something is neither a name nor a family.
    """
    if wanted == "all":
        return list(families().values())
    remedy = 'pass "all", names, or classes such as LowRank'
    if not isinstance(wanted, Iterable):
        raise TypeError(checks.fault("families", "names or classes", repr(wanted), remedy))
    items = (
        [part.strip() for part in wanted.split(",") if part.strip()]
        if isinstance(wanted, str)
        else list(wanted)
    )
    if not items:
        raise ValueError(checks.fault("families", "named", "none", 'use "all" or name one, e.g. LowRank'))
    for item in items:
        if not isinstance(item, str) and not (isinstance(item, type) and issubclass(item, Structure)):
            raise TypeError(checks.fault("families", "names or classes", repr(item), remedy))
    return list(dict.fromkeys(family(item) if isinstance(item, str) else item for item in items))


def from_json(data: Mapping[str, Any]) -> Structure:
    """The structure that `Structure.to_json` wrote; an unknown family or field is a ValueError.

    Args:
        data: a dictionary with the key "family"; nested structures are dictionaries of the same kind.

    Returns:
        An equal structure.

    Raises:
        TypeError: the data is no dictionary with the key "family".

    Examples:
        >>> str(from_json({"family": "LowRank", "rank": 8}))
        'LowRank(rank=8)'
    """
    if not isinstance(data, Mapping) or "family" not in data:
        remedy = 'write e.g. {"family": "LowRank", "rank": 8}'
        raise TypeError(checks.fault("structure", 'a dictionary with the key "family"', repr(data), remedy))
    values = {name: _nested(value) for name, value in data.items() if name != "family"}
    return family(data["family"]).from_fields(values)


def from_text(text: str) -> Structure:
    """The structure that `str(structure)` is: a family with its sizes in brackets.

    Args:
        text: such as "LowRank(rank=8)"; fields at their default may be left out, words need no quotes.

    Returns:
        The structure; an unknown family or field is a ValueError.

    Raises:
        ValueError: it is not written like one.

    Examples:
        >>> from_text("SparseProduct(factors=2, sparsity=14, algorithm=random)").sparsity
        14
        >>> str(from_text("Hierarchical(rank=30)"))
        'Hierarchical(rank=30)'
    """
    try:
        data = _data_of(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError:
        data = None
    if not isinstance(data, dict):
        remedy = "write it as a report does, e.g. LowRank(rank=30)"
        raise ValueError(checks.fault("structure", "Family(field=value, ...)", repr(text), remedy))
    return from_json(data)


def _data_of(node: ast.expr) -> Any:
    """JSON-ready data of one piece of a structure's text."""
    match node:
        case ast.Call(ast.Name(name), [], keywords) if all(word.arg for word in keywords):
            return {"family": name, **{str(word.arg): _data_of(word.value) for word in keywords}}
        case ast.Name(name):
            return name
        case ast.Tuple(items) | ast.List(items):
            return [_data_of(item) for item in items]
        case ast.Constant(value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as number)):
            return -number
    raise SyntaxError


def _nested(value: Any) -> Any:
    if isinstance(value, Mapping):
        return from_json(value)
    if isinstance(value, list):
        return [_nested(item) for item in value]
    return value
