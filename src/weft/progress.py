"""Progress bars: shown on a terminal, silent elsewhere."""

import operator
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

Item = TypeVar("Item")


def track(
    items: Iterable[Item], description: str, *, total: int | None = None, shown: bool | None = None
) -> Iterator[Item]:
    """Goes through items under a progress bar on standard error.

    Args:
        items: what to go through.
        description: what is being done, in a few words.
        total: how many items there are, where `len` does not tell.
        shown: whether to draw; where None, only on a terminal.

    Yields:
        The items.
    """
    if shown is None:
        shown = sys.stderr.isatty()
    if total is None:
        total = operator.length_hint(items) or None  # also where `__len__` exists but cannot tell
    yield from rich_track(
        items, description, total=total, disable=not shown, transient=True, console=Console(stderr=True)
    )
