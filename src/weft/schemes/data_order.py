"""Where a source of batches stands in its sequence of orders, so that a resumed run sees the same data."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class Passes(Protocol):
    """Batches whose order follows from the number of passes before, as weft's own data sets give them."""

    passes: int

    def resume_at(self, passes: int) -> None:
        """Makes the next pass the one after so many."""
        ...


def order_of(batches: Iterable[Any]) -> list[Any]:
    """The state that decides the order of the next pass, the global random generators aside.

    Args:
        batches: a list, a DataLoader, a weft data set's batches, or a wrapper that holds one as `batches`.

    Returns:
        Passes and generators' states, fit for a checkpoint; empty where the order never changes.
    """
    return [
        source.get_state() if isinstance(source, torch.Generator) else source.passes
        for source in _sources(batches)
    ]


def restore_order(batches: Iterable[Any], state: list[Any]) -> None:
    """Puts batches back to where `order_of` was asked.

    Args:
        batches: a source made as the one before.
        state: what `order_of` gave.
    """
    for source, held in zip(_sources(batches), state, strict=True):
        if isinstance(source, torch.Generator):
            source.set_state(held)
        else:
            source.resume_at(held)


def _sources(batches: Any) -> Iterator[torch.Generator | Passes]:
    seen: set[int] = set()
    while batches is not None:
        if isinstance(batches, Passes):
            yield batches
        for holder in (batches, getattr(batches, "sampler", None)):  # a DataLoader, and what draws for it
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator) and id(generator) not in seen:
                seen.add(id(generator))
                yield generator
        batches = getattr(batches, "batches", None)
