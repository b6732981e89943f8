"""Plans: which structure stands in for which layer."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weft import checks
from weft.plan.budget import Budget
from weft.storage import write_text
from weft.structures import from_json
from weft.structures.base import Candidate, Cost, Structure
from weft.survey import Survey, read_json


@dataclass(frozen=True)
class Plan(Mapping[str, Structure]):
    """Structures by layer name; a value, stored as JSON that may be edited by hand.

    Attributes:
        structures: layer name -> structure; layers that are not named stay dense.
        budget: what it was made for; None for a plan made by hand.
        expected: what allocation predicted per layer: cost and error; empty for a plan made by hand.
        total: the whole network's predicted cost.
        source: the model source, recorded for the next verb.
    """

    structures: dict[str, Structure]
    budget: Budget | None = None
    expected: dict[str, Candidate] = field(default_factory=dict)
    total: Cost | None = None
    source: str = ""

    def __getitem__(self, name: str) -> Structure:
        return self.structures[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.structures)

    def __len__(self) -> int:
        return len(self.structures)

    def __hash__(self) -> int:
        return hash(tuple(self.structures.items()))

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
        return {
            "weft_plan": 1,
            "source": self.source,
            "budget": None if self.budget is None else self.budget.given(),
            "total": None if self.total is None else asdict(self.total),
            "layers": layers,
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
            ValueError: a layer's structure cannot be read; it is named.
        """
        data = read_json(path, "weft_plan", "write it with weft plan")
        structures, expected = {}, {}
        for name, entry in data.get("layers", {}).items():
            try:
                structures[name] = from_json(entry["structure"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"layer {name} of {path}: {error}") from error
            if "cost" in entry and "error" in entry:
                expected[name] = Candidate(structures[name], Cost(**entry["cost"]), float(entry["error"]))
        budget = Budget(**data["budget"]) if data.get("budget") else None
        total = Cost(**data["total"]) if data.get("total") else None
        return cls(structures, budget, expected, total, data.get("source", ""))


def check_plan(plan: Mapping[str, Structure], survey: Survey) -> None:
    """Checks that a plan can be carried out on a surveyed model.

    Args:
        plan: structures by layer name.
        survey: the model's survey.

    Raises:
        ValueError: a layer is not in the model or left dense for a reason, or a structure is impossible for
            it.
    """
    for name, structure in plan.items():
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
