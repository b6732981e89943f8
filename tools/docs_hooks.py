"""What the documentation site takes from the code: mkdocs calls `on_page_markdown` for every page.

A page asks for generated text by a comment on a line of its own: `<!-- generated: families -->`.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import typer

import weft
from weft.cli import app
from weft.structures import families
from weft.structures.base import Structure

_MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts generated text in the place of its mark.

    Args:
        markdown: the page's source.

    Returns:
        The source with the text in it; an unknown mark is a KeyError, which stops the build.
    """
    return _MARK.sub(lambda mark: GENERATED[mark[1]](), markdown)


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(headings)]
    lines += [["---"] * len(lines[0]), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _docstring(value: Any, heading: str) -> str:
    """What mkdocstrings replaces by a docstring, under a heading of its own."""
    options = f"    options:\n      heading: {heading}\n      toc_label: {heading.removeprefix('weft.')}"
    return f"::: {value.__module__}.{value.__qualname__}\n{options}"


# -- families


def family_table() -> str:
    """Every family with its arguments, its first sentence and its source."""
    rows = []
    for name, family in families().items():
        summary = inspect.getdoc(family) or ""
        rows.append([
            f"[`{name}`][{family.__module__}.{family.__qualname__}]",
            summary.splitlines()[0],
            f"`{_arguments(family)}`" if dataclasses.fields(family) else "",
            family.source,
        ])
    return _table(("family", "what it is", "arguments", "source"), rows)


def _arguments(family: type[Structure]) -> str:
    """The fields with their defaults, as one would write them in a call."""
    parts = []
    for field in dataclasses.fields(family):
        value = "" if field.default is dataclasses.MISSING else f"={field.default!s}"
        parts.append(f"{field.name}{value}")
    return ", ".join(parts)


def family_reference() -> str:
    """The docstrings of all families."""
    return "\n\n".join(_docstring(family, name) for name, family in families().items())


# -- command line


def command_line() -> str:
    """Every verb with its help, its example and its options, from the command line's own definitions."""
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="weft")
    parts = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        parts.append(_command(name, command, typer.Context(command, info_name=f"weft {name}")))
    return "\n\n".join(parts)


def _command(name: str, command: Any, context: Any) -> str:
    usage = " ".join(command.get_usage(context).removeprefix("Usage:").split())
    parts = [f"## weft {name}", inspect.cleandoc(command.help or ""), f"```text\n{usage}\n```"]
    lines = [line.strip() for line in (command.epilog or "").splitlines() if line.startswith("  ")]
    if lines:
        parts.append("```sh\n" + "\n".join(lines) + "\n```")
    rows = []
    for parameter in command.get_params(context):
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        written = parameter.opts + parameter.secondary_opts
        named = parameter.metavar or str(parameter.name).upper()
        label = named if parameter.param_type_name == "argument" else ", ".join(written)
        default = getattr(parameter, "default", None)
        shown = "" if default in {None, False, ""} or callable(default) else f"`{default}`"
        needed = "needed" if parameter.required else shown
        rows.append([f"`{label}`", getattr(parameter, "help", None) or "", needed])
    if rows:
        parts.append(_table(("option", "what it does", "default"), rows))
    return "\n\n".join(parts)


# -- Python


def api() -> str:
    """The docstrings of everything in `weft.__all__`, functions first."""
    public = [(name, getattr(weft, name)) for name in weft.__all__]
    public.sort(key=lambda pair: (inspect.isclass(pair[1]), pair[0].lower()))
    return "\n\n".join(_docstring(value, f"weft.{name}") for name, value in public)


GENERATED: dict[str, Callable[[], str]] = {
    "families": family_table,
    "family_reference": family_reference,
    "command_line": command_line,
    "api": api,
}
