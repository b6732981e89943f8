"""Progress: a bar on a terminal, elsewhere a plain line now and then; both on standard error."""

import operator
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

Item = TypeVar("Item")

# Seconds between two lines where no bar can be drawn; work that is done sooner says nothing.
EVERY = 30.0


def track(
    items: Iterable[Item], description: str, *, total: int | None = None, shown: bool | None = None
) -> Iterator[Item]:
    """Goes through items and tells on standard error how far it has come.

    Args:
        items: what to go through.
        description: what is being done, in a few words.
        total: how many items there are, where `len` does not tell.
        shown: whether to draw a bar; where None, a bar on a terminal and elsewhere, such as in the log of a
            job, a line every half minute.

    Yields:
        The items.
    """
    if total is None:
        total = operator.length_hint(items) or None  # also where `__len__` exists but cannot tell
    if shown is None and not sys.stderr.isatty():
        yield from _told(items, description, total)
        return
    drawn = True if shown is None else shown
    yield from rich_track(
        items, description, total=total, disable=not drawn, transient=True, console=Console(stderr=True)
    )


def _told(items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    """The items, and a line now and then from a thread of its own: a single one may take minutes."""
    done, started, ended = 0, time.perf_counter(), threading.Event()

    def tell() -> None:
        while not ended.wait(EVERY):
            of = "" if total is None else f" of {total}"
            seconds = time.perf_counter() - started
            print(f"{description}: {done}{of} done after {seconds:.0f} s", file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        for item in items:
            yield item
            done += 1
    finally:
        ended.set()
        teller.join()
