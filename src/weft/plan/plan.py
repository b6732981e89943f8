"""Plans: which structure stands in for which layer."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weft import checks
from weft.plan.budget import Budget
from weft.plan.pareto import Pareto
from weft.plan.scouting import Scouted
from weft.storage import read_json, write_text
from weft.structures import from_json
from weft.structures.base import Candidate, Cost, Structure
from weft.survey import Survey, in_columns


@dataclass(frozen=True)
class Plan(Mapping[str, Structure]):
    """Structures by layer name; a value, stored as JSON that may be edited by hand.

    Attributes:
        structures: layer name -> structure; layers that are not named stay dense.
        budget: what it was made for; None for a plan made by hand.
        expected: what allocation predicted per layer: cost and error; empty for a plan made by hand.
        total: the whole network's predicted cost.
        source: the model source, recorded for the next verb.
        seconds: the predicted time per call; None where the budget does not limit it.
        peak_memory: the predicted peak of weights and activations of a call with one sample, in bytes; None
            where the budget does not limit it.
        others: layer name -> family -> why it was not chosen.
        pareto: the network's Pareto curves, all families together and each alone, with the plan's own point;
            None for a plan made by hand.
        scouted: what was not tried, and what that is known from.
    """

    structures: dict[str, Structure]
    budget: Budget | None = None
    expected: dict[str, Candidate] = field(default_factory=dict)
    total: Cost | None = None
    source: str = ""
    seconds: float | None = None
    peak_memory: int | None = None
    others: dict[str, dict[str, str]] = field(default_factory=dict, compare=False)
    pareto: Pareto | None = field(default=None, compare=False)
    scouted: tuple[Scouted, ...] = field(default=(), compare=False)

    def __getitem__(self, name: str) -> Structure:
        return self.structures[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.structures)

    def __len__(self) -> int:
        return len(self.structures)

    def __hash__(self) -> int:
        return hash(frozenset(self.structures.items()))

    def __str__(self) -> str:
        rows = []
        for name, structure in self.items():
            point = self.expected.get(name)
            told = (
                () if point is None else (f"{point.cost.parameters:,} parameters", f"error {point.error:.4f}")
            )
            rows.append((name, str(structure), *told))
        head = "plan" if self.budget is None else f"plan for {self.budget.in_words()}"
        return "\n".join([f"{head}, {len(rows)} layers", *in_columns(rows)])

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-ready data.

        Returns:
            Budget, layers with structure, cost and error, total.
        """
        layers: dict[str, Any] = {}
        for name, structure in self.structures.items():
            layers[name] = {"structure": structure.to_json()}
            if name in self.expected:
                point = self.expected[name]
                layers[name] |= {"cost": asdict(point.cost), "error": point.error}
            if self.others.get(name):
                layers[name]["others"] = self.others[name]
        return {
            "weft_plan": 1,
            "source": self.source,
            "budget": None if self.budget is None else self.budget.given(),
            "total": None if self.total is None else asdict(self.total),
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "layers": layers,
            "scouted": [found.to_json() for found in self.scouted],
            "pareto": None if self.pareto is None else self.pareto.to_json(),
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the plan as JSON.

        Args:
            path: the file.

        Returns:
            The path.
        """
        return write_text(path, json.dumps(self.to_json(), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Reads a plan, written by `save` or by hand.

        Args:
            path: the JSON file; a layer's cost and error may be left out.

        Returns:
            The plan.

        Raises:
            ValueError: it is no plan, or an entry cannot be read; its layer is named.
        """
        data = read_json(path, "weft_plan", "write it with weft plan")
        layers = data.get("layers")
        if not isinstance(layers, dict):
            remedy = 'write e.g. "layers": {"fc": {"structure": {"family": "LowRank", "rank": 8}}}'
            raise ValueError(checks.fault(f"layers of {path}", "a JSON dictionary", repr(layers), remedy))
        structures, expected, others = {}, {}, {}
        for name, entry in layers.items():
            try:
                structures[name] = from_json(_checked(entry)["structure"])
                if "others" in entry:
                    others[name] = dict(entry["others"])
                if "cost" in entry and "error" in entry:
                    expected[name] = Candidate(structures[name], Cost(**entry["cost"]), float(entry["error"]))
            except (TypeError, ValueError) as error:
                raise ValueError(f"layer {name} of {path}: {error}") from error
        try:
            budget = Budget(**data["budget"]) if data.get("budget") else None
            total = Cost(**data["total"]) if data.get("total") else None
            pareto = Pareto.from_json(data["pareto"]) if data.get("pareto") else None
            scouted = tuple(Scouted.from_json(found) for found in data.get("scouted") or ())
        except (TypeError, ValueError) as error:
            raise ValueError(f"budget, total, curves or scouting of {path}: {error}") from error
        source, seconds, memory = (data.get(name) for name in ("source", "seconds", "peak_memory"))
        return cls(
            structures, budget, expected, total, source or "", seconds, memory, others, pareto, scouted
        )


def _checked(entry: object) -> dict[str, Any]:
    """A layer's entry, its keys known: a misspelt one must not be passed over."""
    known = ("structure", "cost", "error", "others")
    if not isinstance(entry, dict) or "structure" not in entry or set(entry) - set(known):
        expected = f"a dictionary with the keys {', '.join(known)}"
        raise ValueError(checks.fault("entry", expected, repr(entry), "only the structure is needed"))
    return entry


def check_plan(plan: Mapping[str, Structure], survey: Survey) -> None:
    """Checks that a plan can be carried out on a surveyed model.

    Args:
        plan: structures by layer name.
        survey: the model's survey.

    Raises:
        ValueError: a layer is not in the model or left dense for a reason, or a structure is impossible for
            it.
        TypeError: something in it is no structure.
    """
    for name, structure in plan.items():
        if not isinstance(structure, Structure):
            remedy = "pass e.g. LowRank(rank=8); weft.structures.from_text reads text"
            raise TypeError(checks.fault(f"plan of layer {name}", "a structure", repr(structure), remedy))
        layer = survey.layers.get(name)
        if layer is None:
            reason = survey.left_dense.get(name)
            got = f"left dense, because {reason}" if reason else "not in the model"
            remedy = "remove it from the plan, or plan for this model"
            raise ValueError(checks.fault(f"layer {name}", "one that can be replaced", got, remedy))
        reason = structure.refusal(layer.shape, layer.geometry)
        if reason is not None:
            remedy = "choose another family for it"
            raise ValueError(
                checks.fault(
                    f"layer {name}", f"one that {structure} takes", f"refused, because {reason}", remedy
                )
            )
        try:
            structure.check(layer.shape)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
