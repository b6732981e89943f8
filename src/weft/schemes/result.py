"""What every scheme returns."""

from typing import Any, NamedTuple

from torch import nn


class Result(NamedTuple):
    """A network and how it came about.

    Attributes:
        model: the compressed network.
        log: one dictionary per step, JSON-ready.
    """

    model: nn.Module
    log: list[dict[str, Any]]
