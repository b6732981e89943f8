"""The planner over all families against every single family at a uniform ratio, without any training.

    python experiments/planner.py minilm       # a sentence encoder, by bytes; its packages: sentences.py
    python experiments/planner.py resnet20     # CIFAR-10, by multiply-adds and by bytes
    python experiments/planner.py keep         # keep=0.99 on the MNIST network and on ResNet-20
    python experiments/planner.py --quick      # keep=0.99 on the MNIST network alone

Calibrated on 1,000 samples without labels; evaluated on others that no choice depends on. A single family
takes the same share of every layer ("uniform"); the planner chooses family and size for every layer ("plan"),
and then also fits the layers in sequence ("sequential"). All are fitted in the same metrics and corrected
alike. "nearest" are weights rounded to the nearest of as many levels as the budget has bits for, the largest
entry of a row or group being the last level, as anybody would do it first.

Rows go one by one to experiments/results/planner.json, and those that are there are kept: give --fresh to
measure them again. Skips with a message where packages or data are absent.
"""

import copy
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import sentences
import torch
from data import shared_file
from records import Records, Sheet, parser, show
from torch import Tensor, nn

import weft
from weft.measure import Batch, accuracy, network_cost
from weft.plan.error_curves import error_curves
from weft.sources import load_data, load_model
from weft.structures import select
from weft.structures.base import Candidate
from weft.survey import Survey

HERE = Path(__file__).parent
CACHE = HERE.parent / "build" / "planner"
ALL = "all"  # of the network's families, which the row names
# Families whose curves take minutes for 22 million parameters; those that stand together build on each other.
SENTENCE_FAMILIES = (("LowRank",), ("Quantized", "DividedRows"))
KERNEL_FAMILIES = (("LowRank",), ("Separable",), ("CanonicalPolyadic",))
# Bits and group (None: a row) whose bytes the budgets of the sentence encoder are.
ROUNDED = {0.109: (3, 32), 0.141: (4, 32), 0.164: (5, 64), 0.189: (6, None), 0.251: (8, None)}

Families = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Way:
    """One way to come within a budget.

    Attributes:
        families: what is chosen from; "all" of the network's, the name of one, or none for rounding.
        how: "plan", "sequential", "uniform" or "nearest".
        budgets: limits and shares that it is measured at.
    """

    families: str
    how: str
    budgets: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Setting:
    """A network with all that planning and judging it needs.

    Attributes:
        families: what the planner is offered, by the limit: groups whose members may build on each other.
        graded: a survey with gradients, which predicts what the layers' errors cost the network.
        divergence: of outputs, in which the layers' sensitivity is measured.
    """

    model: nn.Module
    survey: Survey
    calibration: Sequence[Batch]
    evaluate: Callable[[nn.Module], dict[str, float]]
    families: Mapping[str, Families]
    ways: Sequence[Way]
    graded: Callable[[], Survey]
    divergence: Literal["squared", "kullback_leibler"]


def sentence_encoder() -> Setting:
    """all-MiniLM-L6-v2, the table of tokens included."""
    model = sentences.sentence_encoder()
    calibration, held_out = sentences.calibration_and_evaluation()
    reference = sentences.embeddings(model, held_out)

    def evaluate(network: nn.Module) -> dict[str, float]:
        return sentences.agreement(sentences.embeddings(network, held_out), reference)

    budgets = [("bytes", share) for share in ROUNDED]
    asked = [budget for budget in budgets if budget[1] in {0.109, 0.141, 0.189}]
    ways = [
        Way("", "nearest", budgets),
        Way(ALL, "plan", asked),
        Way("LowRank", "uniform", asked),
        Way("Quantized", "uniform", asked),
        Way(ALL, "sequential", asked[:1]),
    ]
    survey = weft.survey(model, calibration, loss="squared")
    return Setting(
        model, survey, calibration, evaluate, {"bytes": SENTENCE_FAMILIES}, ways, lambda: survey, "squared"
    )


def cifar_network() -> Setting:
    """ResNet-20."""
    model = load_model(f"{HERE / 'models.py'}:resnet20", shared_file("cifar10/resnet20.npz"))
    data = load_data(f"{HERE / 'data.py'}:cifar10")
    calibration = list(data.inputs("calibration", batch_size=100, limit=1000))
    held_out = list(data.batches("test", batch_size=250))

    def evaluate(network: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(network, held_out)}

    products = [("multiply_adds", share) for share in (0.5, 0.35, 0.25)]
    sizes = [("bytes", share) for share in (0.125, 0.075)]
    ways = [
        *(Way(name, "uniform", products) for (name,) in KERNEL_FAMILIES),
        Way(ALL, "plan", products),
        Way(ALL, "sequential", products),
        Way("Quantized", "uniform", sizes),
        Way(ALL, "plan", sizes),
    ]
    families = {"multiply_adds": KERNEL_FAMILIES, "bytes": (*KERNEL_FAMILIES, ("Quantized", "DividedRows"))}
    survey = weft.survey(model, calibration)
    return Setting(
        model,
        survey,
        calibration,
        evaluate,
        families,
        ways,
        lambda: weft.survey(model, calibration, teacher=model),
        "kullback_leibler",
    )


SETTINGS: Mapping[str, Callable[[], Setting]] = {"minilm": sentence_encoder, "resnet20": cifar_network}


def compare(part: str, make: Callable[[], Setting], records: Records) -> None:
    """All rows of one network that are missing."""
    setting = make()
    records.row(part, {"how": "dense"}, lambda: setting.evaluate(setting.model))
    curves: dict[tuple[str, ...], Mapping[str, Sequence[Candidate]]] = {}

    def curves_of(families: Families) -> dict[str, list[Candidate]]:
        for names in map(tuple, families):
            if names not in curves:
                started = time.perf_counter()
                curves[names] = error_curves(setting.survey, select(names), costs=["bytes"], cache=CACHE)
                print(f"curves of {', '.join(names)}: {time.perf_counter() - started:.0f} s", flush=True)
        layers = setting.survey.layers
        return {name: [point for own in families for point in curves[tuple(own)][name]] for name in layers}

    for way in setting.ways:
        for limit, share in way.budgets:
            key = {"families": way.families, "how": way.how, "limit": limit, "share": share}
            if way.how == "nearest":
                row = records.row(part, key, partial(nearest, setting, *ROUNDED[share]))
            else:
                families = setting.families[limit] if way.families == ALL else [[way.families]]
                budget = weft.Budget(**{limit: share})
                row = records.row(part, key, partial(planned, setting, families, budget, way.how, curves_of))
            print({name: value for name, value in row.items() if name != "plan"}, flush=True)
    row = records.row(part, {"how": "sensitivity", "families": "LowRank"}, partial(sensitivity, setting))
    print(f"predicted and measured sensitivity: rank correlation {row['rank_correlation']:.3f}", flush=True)


def sensitivity(setting: Setting) -> dict[str, Any]:
    """What low ranks cost the network, predicted from gradients and measured layer by layer."""
    graded = setting.graded()
    curves = error_curves(graded, select(["LowRank"]), cache=CACHE)
    found = weft.measure_sensitivity(
        setting.model, graded, curves, setting.calibration[::5], divergence=setting.divergence
    )
    return {
        "rank_correlation": found.correlation,
        "measured_in": setting.divergence,
        "probes": {name: [list(probe) for probe in probes] for name, probes in found.probes.items()},
        "predicted": {name: list(values) for name, values in found.predicted.items()},
    }


def planned(
    setting: Setting,
    families: Families,
    budget: weft.Budget,
    how: str,
    curves_of: Callable[[Families], Mapping[str, Sequence[Candidate]]],
) -> dict[str, Any]:
    """Plans, compresses and evaluates; says so where no plan meets the budget."""
    method = "uniform" if how == "uniform" else "lagrangian"
    names = [name for own in families for name in own]
    try:
        plan = weft.allocate(setting.survey, names, budget, method=method, curves=curves_of(families))
    except ValueError as error:
        return {"unreachable": str(error)}
    small, log = weft.compress(
        setting.model, plan, setting.survey, batches=setting.calibration, sequential=how == "sequential"
    )
    dense, cost = setting.survey.total, network_cost(small, setting.calibration[0])
    spent = sum(
        entry["multiply_adds"] - setting.survey.layers[entry["layer"]].cost.multiply_adds for entry in log
    )
    return {
        **setting.evaluate(small),
        "bytes": cost.bytes / dense.bytes,
        "multiply_adds": 1 + spent / dense.multiply_adds,
        "offered": names,
        "chosen": chosen(plan),
        "plan": {name: str(structure) for name, structure in plan.items()},
    }


def nearest(setting: Setting, bits: int, group: int | None) -> dict[str, Any]:
    """Every weight rounded to the nearest level, its scales in half precision."""
    model = copy.deepcopy(setting.model)
    size = setting.survey.total.bytes
    for layer in setting.survey.layers.values():
        weight = model.get_submodule(layer.name).weight
        width = min(group or weight.shape[1], weight.shape[1])
        with torch.no_grad():
            weight.copy_(_rounded(weight.unflatten(1, (-1, width)), bits).flatten(1))
        size += weight.numel() * bits // 8 + weight.numel() // width * 2 - layer.cost.bytes
    return {
        **setting.evaluate(model),
        "bytes": size / setting.survey.total.bytes,
        "levels": f"{bits} bits, a scale per {'row' if group is None else f'{group} entries'}",
    }


def _rounded(parts: Tensor, bits: int) -> Tensor:
    """Groups on the last axis; levels symmetric about zero."""
    last = 2 ** (bits - 1) - 1
    scales = (parts.abs().amax(-1, keepdim=True) / last).half().to(parts).clamp_min(1e-8)
    return (parts / scales).round().clamp(-last - 1, last) * scales


def chosen(plan: weft.Plan) -> dict[str, int]:
    """How many layers have which family."""
    return dict(Counter(type(structure).__name__ for structure in plan.values()))


KEPT = {
    "mnist": (f"{HERE / 'models.py'}:mnist_network", "mnist/mlp_784_128_32_10.npz", "mnist"),
    "resnet20": (f"{HERE / 'models.py'}:resnet20", "cifar10/resnet20.npz", "cifar10"),
}


def keep(network: str, families: tuple[str, ...], minimise: str) -> dict[str, Any]:
    """`keep=0.99` on one half of the test data, and what it comes to on the other half."""
    source, weights, data_name = KEPT[network]
    model = load_model(source, shared_file(weights))
    data = load_data(f"{HERE / 'data.py'}:{data_name}")
    calibration = list(data.inputs("calibration", batch_size=100, limit=1000))
    seen, unseen = data.split("test").divide(0.5, 250)
    survey = weft.survey(model, calibration)
    found = weft.search(
        model,
        survey,
        families,
        weft.Budget(keep=0.99),
        evaluate=lambda tried: accuracy(tried, seen),
        batches=calibration,
        minimise=minimise,
        curves=error_curves(survey, select(families), cache=CACHE),
    )
    dense_unseen, unseen_value = (accuracy(one, unseen) for one in (model, found.model))
    cost = network_cost(found.model, calibration[0])
    return {
        "seen": found.value / found.dense_value,
        "unseen": unseen_value / dense_unseen,
        "dense_unseen": dense_unseen,
        "bytes": cost.bytes / survey.total.bytes,
        "multiply_adds": cost.multiply_adds / survey.total.multiply_adds,
        "steps": found.log,
        "chosen": chosen(found.plan),
        "plan": {name: str(structure) for name, structure in found.plan.items()},
    }


def keep_rows(records: Records, quick: bool) -> None:
    """Rows of networks and of what is made small."""
    ways = [("mnist", ("LowRank", "Quantized"), "bytes")]
    if not quick:
        ways += [
            ("mnist", ("LowRank",), "multiply_adds"),
            ("resnet20", ("Quantized", "DividedRows"), "bytes"),
            ("resnet20", ("LowRank", "Separable"), "multiply_adds"),
        ]
    for network, families, minimise in ways:
        key = {"network": network, "offered": list(families), "minimise": minimise, "keep": 0.99}
        row = records.row("keep", key, partial(keep, network, families, minimise))
        print({name: value for name, value in row.items() if name not in {"plan", "steps"}}, flush=True)


def sheets(records: Records) -> Iterator[Sheet]:
    """One table per network."""
    for part in SETTINGS:
        rows = [row for row in records.of(part) if "share" in row]
        budgets = list(dict.fromkeys((row["limit"], row["share"]) for row in rows))
        ways = list(dict.fromkeys((row["families"], row["how"]) for row in rows))
        cells = {(row["families"], row["how"], row["limit"], row["share"]): _cell(row) for row in rows}
        headings = ["families", *(f"{limit.replace('_', '-')} {share:g}" for limit, share in budgets)]
        lines = [
            [", ".join(filter(None, way)), *(cells.get((*way, *budget), "") for budget in budgets)]
            for way in ways
        ]
        measure = "cosine to the dense embedding, same nearest neighbour" if part == "minilm" else "top-1"
        yield Sheet(f"{part}, {measure}", headings, lines)
    lines = [
        [
            row["network"],
            row["minimise"].replace("_", "-"),
            ", ".join(row["offered"]),
            f"{row['bytes']:.3f}",
            f"{row['multiply_adds']:.3f}",
            f"{row['seen']:.4f}",
            f"{row['unseen']:.4f}",
        ]
        for row in records.of("keep")
    ]
    headings = ["network", "made small", "families", "bytes", "multiply-adds", "kept, seen", "kept, unseen"]
    yield Sheet("keep=0.99", headings, lines)


def _cell(row: Mapping[str, Any]) -> str:
    if "unreachable" in row:
        return "-"
    if "cosine" in row:
        return f"{row['cosine']:.4f} {row['neighbours']:.3f}"
    return f"{row['accuracy']:.4f}"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("part", nargs="*", choices=[*SETTINGS, "keep", []])
    given = options.parse_args()
    torch.manual_seed(0)
    records = Records("planner", fresh=given.fresh, quick=given.quick, packages=("transformers",))
    for part in given.part or (["keep"] if given.quick else [*SETTINGS, "keep"]):
        try:
            if part == "keep":
                keep_rows(records, given.quick)
            else:
                compare(part, SETTINGS[part], records)
        except FileNotFoundError as error:
            print(f"skipped: {error}")
    show(sheet for sheet in sheets(records) if sheet.rows)


if __name__ == "__main__":
    sys.exit(main())
