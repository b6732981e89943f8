"""Budgets: what a network may cost."""

import math
from dataclasses import dataclass, fields
from typing import Any

from weft import checks
from weft.structures.base import Cost

COSTS = ("parameters", "bytes", "multiply_adds")


@dataclass(frozen=True, repr=False)
class Budget:
    """What the whole network may cost, layers left dense included; one limit or several.

    A float up to 1 is a share of the dense network; a whole number above 1 is absolute.

    Args:
        parameters: real coefficients, before packing: an entry that is stored as a code is still one, so that
            quantised weights save bytes but no parameters.
        bytes: bytes of the stored tensors.
        multiply_adds: multiply-adds per sample; needs a survey with batches.
        latency: share of the dense network's time per call; needs a latency table.
        latency_seconds: seconds per call; needs a latency table.
        peak_memory: bytes that weights and activations of a call with one sample take at the most, all that
            structured matrices keep beside their weights included; needs a memory table.
        keep: share of the dense network's metric that must be kept; needs a search over held-out data.

    Raises:
        TypeError: a limit is no number.
        ValueError: there is no limit, or one is neither a share nor a whole number.

    Examples:
        >>> Budget(parameters=0.25).limits(Cost(parameters=1000, bytes=4000))
        {'parameters': 250}
        >>> Budget.parse("bytes=0.1,multiply_adds=0.5")
        Budget(bytes=0.1, multiply_adds=0.5)
    """

    parameters: float | int | None = None
    bytes: float | int | None = None
    multiply_adds: float | int | None = None
    latency: float | None = None
    latency_seconds: float | None = None
    peak_memory: float | int | None = None
    keep: float | None = None

    def __post_init__(self) -> None:
        given = self.given()
        if not given:
            remedy = "e.g. Budget(parameters=0.25)"
            names = ", ".join(field.name for field in fields(self))
            raise ValueError(checks.fault("budget", f"given as one of {names}", "none", remedy))
        for name, limit in given.items():
            if name == "latency_seconds":
                checks.positive("budget latency_seconds", limit)
            elif name in {"latency", "keep"}:
                checks.share(f"budget {name}", limit)
            elif isinstance(limit, float) or (limit == 1 and not isinstance(limit, bool)):
                if not (0 < limit <= 1):
                    expected = "a share above 0 and at most 1, or a whole number"
                    raise ValueError(checks.fault(f"budget {name}", expected, limit, f"e.g. {name}=0.25"))
            else:
                checks.integer_between(f"budget {name}", limit, 1, None)

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in self.given().items())})"

    def given(self) -> dict[str, float | int]:
        """The limits that are set.

        Returns:
            Limit by name.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def costs(self) -> tuple[str, ...]:
        """The costs on which a choice under this budget depends.

        Returns:
            Names of `Cost` fields: those that are limited, or all where time, memory or the metric is.
        """
        given = self.given()
        return tuple(name for name in COSTS if name in given) if given.keys() <= set(COSTS) else COSTS

    @property
    def timed(self) -> bool:
        """Whether time is limited, of which costs do not tell: nothing may be left out on their account."""
        return self.latency is not None or self.latency_seconds is not None

    def in_words(self) -> str:
        """What the budget asks for.

        Returns:
            The limits in words.

        Examples:
            >>> Budget(bytes=0.25, latency_seconds=0.002).in_words()
            'at most 25 % of the bytes, at most 0.002 s per call'
            >>> Budget(parameters=1_000_000, keep=0.99).in_words()
            'at most 1,000,000 parameters, at least 99 % of the metric'
        """
        parts = []
        for name, limit in self.given().items():
            what = {"latency": "time per call"}.get(name, name.replace("_", " ").replace("y adds", "y-adds"))
            if name == "keep":
                parts.append(f"at least {100 * limit:g} % of the metric")
            elif name == "latency_seconds":
                parts.append(f"at most {limit:g} s per call")
            elif isinstance(limit, float):
                parts.append(f"at most {100 * limit:g} % of the {what}")
            else:
                unit = "bytes of peak memory" if name == "peak_memory" else what
                parts.append(f"at most {limit:,} {unit}")
        return ", ".join(parts)

    def limits(
        self, dense: Cost, dense_seconds: float | None = None, dense_memory: int | None = None
    ) -> dict[str, float]:
        """The absolute limits, that on the kept metric left out.

        Args:
            dense: the dense network's cost.
            dense_seconds: its time per call.
            dense_memory: its peak memory.

        Returns:
            Limit by name of a `Cost` field; for "latency" in seconds, the smaller of both.

        Raises:
            ValueError: a limit needs something that was not measured.
        """
        absolute: dict[str, float] = {}
        for name, limit in self.given().items():
            if name == "keep":
                continue
            if name in {"latency", "latency_seconds"}:
                if dense_seconds is None:
                    remedy = "pass latency=LatencyTable(...), measured on this machine"
                    raise ValueError(checks.fault(f"budget {name}", "measurable", "no times", remedy))
                seconds = limit if name == "latency_seconds" else limit * dense_seconds
                absolute["latency"] = min(seconds, absolute.get("latency", math.inf))
                continue
            total = dense_memory if name == "peak_memory" else getattr(dense, name)
            if total is None:
                remedy = "pass memory=MemoryTable(...)"
                raise ValueError(checks.fault(f"budget {name}", "measurable", "no memory table", remedy))
            if not total:
                remedy = "survey with batches, so that the network is run"
                raise ValueError(
                    checks.fault(f"budget {name}", "measurable", "a survey without data", remedy)
                )
            absolute[name] = int(limit * total) if isinstance(limit, float) or limit == 1 else limit
        return absolute

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Reads a budget as the command line writes it.

        Args:
            text: "name=value" pairs separated by commas, such as "bytes=0.1,parameters=200000".

        Returns:
            The budget; an unknown name, or one given twice, or a value that is no number, is a ValueError.
        """
        return cls(**_named_numbers("budget", text, cls, "write e.g. --budget bytes=0.25"))


@dataclass(frozen=True)
class Price:
    """What cost is worth: how much loss may rise for every parameter, byte or multiply-add that is saved.

    Args:
        parameters: per real coefficient.
        bytes: per byte of the stored tensors.
        multiply_adds: per multiply-add and sample; needs a survey with batches.

    Raises:
        ValueError: there is no price, or one is negative or not finite.

    Examples:
        >>> Price(parameters=1e-6).of(Cost(parameters=1000, bytes=4000))
        0.001
    """

    parameters: float = 0.0
    bytes: float = 0.0
    multiply_adds: float = 0.0

    def __post_init__(self) -> None:
        for name, price in self.given().items():
            checks.positive(f"price {name}", price)
        if not self.given():
            remedy = "e.g. Price(parameters=1e-6)"
            raise ValueError(checks.fault("price", "above 0 for some cost", "none", remedy))

    def given(self) -> dict[str, float]:
        """The prices that are set.

        Returns:
            Price by name of a `Cost` field.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: price for name, price in values.items() if price != 0}

    def of(self, cost: Cost) -> float:
        """The price of a cost.

        Args:
            cost: any.

        Returns:
            λ C.
        """
        return sum(price * getattr(cost, name) for name, price in self.given().items())

    def check(self, dense: Cost) -> None:
        """Checks that what has a price was measured.

        Args:
            dense: the dense network's cost.

        Raises:
            ValueError: there is a price on multiply-adds, but the network was not run.
        """
        for name in self.given():
            if not getattr(dense, name):
                remedy = "survey with batches, so that the network is run"
                raise ValueError(checks.fault(f"price {name}", "measurable", "a survey without data", remedy))

    @classmethod
    def parse(cls, text: str) -> "Price":
        """Reads a price as the command line writes it.

        Args:
            text: "name=value" pairs separated by commas, such as "parameters=1e-6".

        Returns:
            The price; an unknown name, or one given twice, or a value that is no number, is a ValueError.
        """
        return cls(**_named_numbers("price", text, cls, "write e.g. --price parameters=1e-6"))


def _named_numbers(argument: str, text: str, kind: type[Budget | Price], remedy: str) -> dict[str, Any]:
    known = [field.name for field in fields(kind)]
    values: dict[str, float | int] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in known:
            raise ValueError(checks.fault(argument, f"one of {', '.join(known)}", repr(name), remedy))
        if name in values:
            raise ValueError(checks.fault(f"{argument} {name}", "given once", "twice", "keep one of the two"))
        try:
            values[name] = int(value) if value.isdecimal() else float(value)
        except ValueError:
            raise ValueError(checks.fault(f"{argument} {name}", "a number", repr(value), remedy)) from None
    return values
