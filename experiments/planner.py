"""The planner over all families against every single family at a uniform ratio, without any training.

    python experiments/planner.py minilm       # a sentence encoder, by bytes; its packages: sentences.py
    python experiments/planner.py resnet20     # CIFAR-10, by multiply-adds and by bytes
    python experiments/planner.py keep         # keep=0.99 on the MNIST network and on ResNet-20

Calibrated on 1,000 samples without labels; evaluated on others that no choice depends on. A single family
takes the same share of every layer ("uniform"); the planner chooses family and size for every layer
("plan"), and then also fits the layers in sequence ("sequential"). All are fitted in the same metrics and
corrected alike. Rows go one by one to experiments/results/planner_*.json, and those that are there are kept:
give --fresh to measure them again. Skips with a message where packages or data are absent.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentences
import torch
from data import shared_file
from rich.console import Console
from rich.table import Table
from torch import nn

import weft
from weft.bench import surroundings
from weft.measure import Batch, accuracy, network_cost
from weft.plan.error_curves import error_curves
from weft.sources import load_data, load_model
from weft.storage import write_text
from weft.structures import select
from weft.structures.base import Candidate
from weft.survey import Survey

HERE = Path(__file__).parent
CACHE = HERE.parent / "build" / "planner"
# Families whose curves take minutes for 22 million parameters.
SENTENCE_FAMILIES = ("LowRank", "Quantized", "DividedRows")
ALL = "all"  # of the network's families, which the row names
# Those that build on others have nothing to choose from alone.
WRAPPERS = ("DividedRows",)
KERNEL_FAMILIES = ("LowRank", "Separable")


@dataclass(frozen=True)
class Setting:
    """A network with all that planning and judging it needs."""

    name: str
    model: nn.Module
    survey: Survey
    calibration: Sequence[Batch]
    evaluate: Callable[[nn.Module], dict[str, float]]
    families: tuple[str, ...]
    budgets: tuple[tuple[str, float], ...]


def sentence_encoder() -> Setting:
    model = sentences.sentence_encoder()
    calibration, held_out = sentences.calibration_and_evaluation()
    reference = sentences.embeddings(model, held_out)

    def evaluate(network: nn.Module) -> dict[str, float]:
        return sentences.agreement(sentences.embeddings(network, held_out), reference)

    survey = weft.survey(model, calibration, loss="squared")
    budgets = tuple(("bytes", share) for share in (0.109, 0.141, 0.189, 0.164, 0.251))
    return Setting("minilm", model, survey, calibration, evaluate, SENTENCE_FAMILIES, budgets)


def cifar_network() -> Setting:
    model = load_model(f"{HERE / 'models.py'}:resnet20", shared_file("cifar10/resnet20.npz"))
    data = load_data(f"{HERE / 'data.py'}:cifar10")
    calibration = list(data.inputs("calibration", batch_size=100, limit=1000))
    held_out = list(data.batches("test", batch_size=250))

    def evaluate(network: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(network, held_out)}

    budgets = (*(("multiply_adds", share) for share in (0.5, 0.35)),)
    survey = weft.survey(model, calibration)
    return Setting("resnet20", model, survey, calibration, evaluate, KERNEL_FAMILIES, budgets)


SETTINGS: Mapping[str, Callable[[], Setting]] = {"minilm": sentence_encoder, "resnet20": cifar_network}


class Rows:
    """One part's results file, written row by row."""

    def __init__(self, part: str, *, fresh: bool = False) -> None:
        self.path = HERE / "results" / f"planner_{part}.json"
        self.part, self.rows = part, []
        if self.path.exists() and not fresh:
            self.rows = json.loads(self.path.read_text(encoding="utf-8"))["rows"]

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row with these entries."""
        return next((row for row in self.rows if all(row.get(name) == key[name] for name in key)), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        record = {
            "experiment": "planner",
            "command": f"python experiments/planner.py {self.part}",
            "environment": surroundings("transformers"),
            "rows": self.rows,
        }
        self.path.parent.mkdir(exist_ok=True)
        write_text(self.path, json.dumps(record, indent=1) + "\n")
        print(json.dumps({name: value for name, value in row.items() if name != "plan"}), flush=True)


def compare(setting: Setting, rows: Rows) -> None:
    """All rows of one network that are missing."""
    if rows.find(network=setting.name, how="dense") is None:
        rows.add({"network": setting.name, "how": "dense", **setting.evaluate(setting.model)})
    curves: dict[str, Mapping[str, Sequence[Candidate]]] = {}

    def curves_of(names: Sequence[str]) -> Mapping[str, Sequence[Candidate]]:
        key = ",".join(names)
        if key not in curves:
            started = time.perf_counter()
            curves[key] = error_curves(setting.survey, select(names), cache=CACHE)
            print(f"curves of {key}: {time.perf_counter() - started:.0f} s", flush=True)
        return curves[key]

    alone = [name for name in setting.families if name not in WRAPPERS]
    for ways in ([(ALL, "plan")], [(ALL, "sequential")], [(name, "uniform") for name in alone]):
        for (limit, share), (families, how) in itertools.product(setting.budgets, ways):
            budget = weft.Budget(**{limit: share})
            key = {"network": setting.name, "limit": limit, "share": share, "families": families, "how": how}
            if rows.find(**key) is not None:
                continue
            names = setting.families if families == ALL else (families,)
            started = time.perf_counter()
            try:
                plan = weft.allocate(
                    setting.survey,
                    names,
                    budget,
                    method="uniform" if how == "uniform" else "lagrangian",
                    curves=curves_of(names),
                )
            except ValueError as error:
                rows.add({**key, "unreachable": str(error)})
                continue
            small, log = weft.compress(
                setting.model,
                plan,
                setting.survey,
                batches=setting.calibration,
                sequential=how == "sequential",
            )
            dense, cost = setting.survey.total, network_cost(small, setting.calibration[0])
            rows.add({
                **key,
                **setting.evaluate(small),
                "bytes": cost.bytes / dense.bytes,
                "multiply_adds": sum(entry["multiply_adds"] for entry in log) / dense.multiply_adds,
                "offered": list(names),
                "chosen": chosen(plan),
                "plan": {name: structure.to_json() for name, structure in plan.items()},
                "seconds": time.perf_counter() - started,
                "commit": surroundings()["commit"],
            })


def chosen(plan: weft.Plan) -> dict[str, int]:
    """How many layers have which family."""
    counts: dict[str, int] = {}
    for structure in plan.values():
        name = type(structure).__name__
        counts[name] = counts.get(name, 0) + 1
    return counts


def keep(rows: Rows) -> None:
    """`keep=0.99` on one half of the test data, and what it comes to on the other half."""
    sources = {
        "mnist": (f"{HERE / 'models.py'}:mnist_network", "mnist/mlp_784_128_32_10.npz", "mnist"),
        "resnet20": (f"{HERE / 'models.py'}:resnet20", "cifar10/resnet20.npz", "cifar10"),
    }
    for name, (source, weights, data_name) in sources.items():
        if rows.find(network=name, how="keep") is not None:
            continue
        model = load_model(source, shared_file(weights))
        data = load_data(f"{HERE / 'data.py'}:{data_name}")
        calibration = list(data.inputs("calibration", batch_size=100, limit=1000))
        seen, unseen = data.split("test").halves(250)
        survey = weft.survey(model, calibration)
        families = ("LowRank", "Quantized") if name == "mnist" else KERNEL_FAMILIES
        started = time.perf_counter()
        found = weft.search(
            model,
            survey,
            families,
            weft.Budget(keep=0.99),
            evaluate=lambda network, seen=seen: accuracy(network, seen),
            batches=calibration,
            minimise="bytes",
            curves=error_curves(survey, select(families), cache=CACHE),
        )
        dense_unseen, unseen_value = (accuracy(network, unseen) for network in (model, found.model))
        rows.add({
            "network": name,
            "how": "keep",
            "keep": 0.99,
            "seen": found.value / found.dense_value,
            "unseen": unseen_value / dense_unseen,
            "dense_unseen": dense_unseen,
            "bytes": network_cost(found.model, calibration[0]).bytes / survey.total.bytes,
            "steps": found.log,
            "chosen": chosen(found.plan),
            "seconds": time.perf_counter() - started,
            "commit": surroundings()["commit"],
        })


def show(rows: Rows) -> None:
    """Prints a part's table."""
    console = Console(width=150)
    for network in SETTINGS:
        own = [row for row in rows.rows if row["network"] == network and "share" in row]
        if not own:
            continue
        budgets = list(dict.fromkeys((row["limit"], row["share"]) for row in own))
        ways = list(dict.fromkeys((row["families"], row["how"]) for row in own))
        table = Table(title=f"{network}: {rows.find(network=network, how='dense')}", title_justify="left")
        table.add_column("families")
        for limit, share in budgets:
            table.add_column(f"{limit} {share:g}", justify="right")
        for families, how in ways:
            cells = []
            for limit, share in budgets:
                row = rows.find(network=network, limit=limit, share=share, families=families, how=how)
                cells.append(_cell(row))
            table.add_row(f"{families}, {how}", *cells)
        console.print(table)
    for row in rows.rows:
        if row["how"] == "keep":
            console.print(
                f"{row['network']}: keep 0.99 -> {row['unseen']:.4f} on data the search never saw, "
                f"{row['bytes']:.3f} of the bytes, {row['chosen']}",
                highlight=False,
            )


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if "unreachable" in row:
        return "-"
    if "cosine" in row:
        return f"{row['cosine']:.4f} {row['neighbours']:.3f}"
    return f"{row['accuracy']:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="*", choices=[*SETTINGS, "keep", []])
    parser.add_argument("--fresh", action="store_true", help="measure the rows again")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for part in arguments.part or [*SETTINGS, "keep"]:
        rows = Rows(part, fresh=arguments.fresh)
        try:
            if part == "keep":
                keep(rows)
            else:
                compare(SETTINGS[part](), rows)
        except FileNotFoundError as error:
            print(f"skipped: {error}")
        show(rows)


if __name__ == "__main__":
    sys.exit(main())
