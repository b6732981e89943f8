"""Budgets: what a network may cost."""

import math
from dataclasses import dataclass, fields

from weft import checks
from weft.structures.base import Cost


@dataclass(frozen=True, repr=False)
class Budget:
    """What the whole network may cost, layers left dense included; one limit or several.

    A float up to 1 is a share of the dense network; a whole number above 1 is absolute.

    Args:
        parameters: real coefficients.
        bytes: bytes of the stored tensors.
        multiply_adds: multiply-adds per sample; needs a survey with batches.
        latency: share of the dense network's time per call; needs a latency table.
        latency_seconds: seconds per call; needs a latency table.
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

    def limits(self, dense: Cost, dense_seconds: float | None = None) -> dict[str, float]:
        """The absolute limits, that on the kept metric left out.

        Args:
            dense: the dense network's cost.
            dense_seconds: its time per call.

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
            total = getattr(dense, name)
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
            The budget.

        Raises:
            ValueError: a name is unknown or given twice, or a value is no number.
        """
        known = [field.name for field in fields(cls)]
        values: dict[str, float | int] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in known:
                remedy = "write e.g. --budget bytes=0.25"
                raise ValueError(checks.fault("budget", f"one of {', '.join(known)}", repr(name), remedy))
            if name in values:
                raise ValueError(checks.fault(f"budget {name}", "given once", "twice", "keep one of the two"))
            try:
                values[name] = int(value) if value.isdecimal() else float(value)
            except ValueError:
                remedy = "write e.g. --budget bytes=0.25"
                raise ValueError(checks.fault(f"budget {name}", "a number", repr(value), remedy)) from None
        return cls(**values)
