"""Kissel and Diepold 2022: semiseparable and other structured layers, approximated, trained, or from scratch.

    python experiments/kissel_diepold.py           # about an hour of one core
    python experiments/kissel_diepold.py --quick   # a seed, a set of classes for both figures, less training
    python experiments/kissel_diepold.py --model torchvision:googlenet --layer fc --data imagefolder:DIR

"figure 1": networks at 20 % of a layer's parameters by approximation alone, by approximation and training,
and by training from a random start. The layer is that of 100 of the classes of MobileNetV2's classifier, two
random sets of them, three seeds each; it learns the dense layer's scores on the crops' features and is judged
on the images of f_val that belong to its classes. Beside it the two hidden layers of LeNet-300-100, which
learn the trained network's scores on MNIST. "figure 2": accuracy and the time of one image by the share of
parameters, of the whole classifier (1000 classes) and of LeNet-300-100.

Of a family's members of the largest size within the share that which is nearest in the metric of the inputs
is taken. Learning rates are chosen by the sample images as they are (the training features are crops of
them), and for LeNet by held-out training images. Another network's layer learns from what the network makes
of the images before it; its classes are drawn in the same way. Rows that
experiments/results/kissel_diepold.json has are not measured again.
"""

import copy
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import product
from operator import itemgetter
from typing import Any

import torch
from data import imagenet_crops, imagenet_features, shared_file
from learning_compression import network
from models import mobilenet_v2_classifier
from records import Records, Sheet, parser, show
from torch import Tensor, nn

import weft
from weft.measure import accuracy, inputs, network_cost, threads, time_alternating
from weft.progress import track
from weft.schemes.fine_tune import FineTune
from weft.schemes.from_scratch import FromScratch
from weft.schemes.objective import Objective
from weft.sources import load_data, load_model
from weft.sources.splits import Batches, TensorSplit
from weft.structures import from_json as structure_from_json
from weft.structures.base import Structure, relative_error
from weft.structures.hierarchical import Hierarchical
from weft.structures.low_rank import LowRank
from weft.structures.pruned import Pruned
from weft.structures.semiseparable import SequentiallySemiseparable
from weft.structures.sparse_product import SparseProduct
from weft.structures.tensor_train import TensorTrain
from weft.survey import LayerSurvey

SHARE, SHARES = 0.2, (0.1, 0.3, 0.05, 0.2, 0.5)  # the reduced form has the first two
CLASSES, SETS, SEEDS = 100, 2, 3
RATES = (1e-2, 3e-3, 1e-3, 3e-4)
CLASSIFIER, LENET = "MobileNetV2's classifier", "LeNet-300-100"
OBJECTIVE = Objective(temperature=1.0)


# ------------------------------------------------------------------------------------------------------------
# The members of a size


def largest(make: Callable[[int], Structure], layer: LayerSurvey, budget: int) -> list[Structure]:
    """The largest structure of those numbered 1, 2, ... that has at most so many parameters, or none."""
    low, high = 0, min(layer.shape)
    while low < high:
        middle = (low + high + 1) // 2
        count = make(middle).parameter_count(layer.shape)
        low, high = (middle, high) if count is not None and count <= budget else (low, middle - 1)
    return [make(low)] if low else []


def hierarchical(layer: LayerSurvey, budget: int) -> Iterator[Structure]:
    for parts in (4, 8, 16):
        leaf = max(4, min(layer.shape) // parts)
        for kind in ("weak", "uniform"):
            yield from largest(partial(Hierarchical, leaf_size=leaf, admissibility=kind), layer, budget)


def semiseparable(layer: LayerSurvey, budget: int) -> list[Structure]:
    return [SequentiallySemiseparable.search(layer.weight, budget, input_gram=layer.input_gram)]


def sparse_product(layer: LayerSurvey, budget: int) -> list[Structure]:
    """Two factors; how many entries they have, K per line or a little more, is known when they are fitted."""
    lines = sum(map(max, SparseProduct(2, 1).factor_shapes(layer.shape)))
    sparsity = min(int(0.98 * budget / lines), *layer.shape)
    while sparsity:
        structure = SparseProduct(2, sparsity, "splitting")
        count = structure.fit(layer.weight, input_gram=layer.input_gram).parameter_count()
        if count <= budget:
            return [structure]
        sparsity = min(sparsity - 1, int(sparsity * budget / count))
    return []


def tensor_train(layer: LayerSurvey, budget: int) -> Iterator[Structure]:
    for modes in ("skewed", "balanced"):
        yield from largest(partial(TensorTrain, modes=modes), layer, budget)


def pruned(layer: LayerSurvey, budget: int) -> list[Structure]:
    return [Pruned(budget / layer.weight.numel(), score="search")]


Members = Callable[[LayerSurvey, int], Iterable[Structure]]
# The paper's families (but for low displacement rank, which is not here), then two that win at the same size.
FAMILIES: Mapping[str, Members] = {
    "SequentiallySemiseparable": semiseparable,
    "LowRank": partial(largest, LowRank),
    "Hierarchical": hierarchical,
    "SparseProduct": sparse_product,
    "TensorTrain": tensor_train,
    "Pruned": pruned,
}


# ------------------------------------------------------------------------------------------------------------
# Networks and data


class NoMember(ValueError):
    """A family's smallest member is larger than was asked for."""


class Task:
    """A network, the layers of it that get structure, and its data.

    Args:
        model: the dense network.
        layers: names of layers; the others stay dense.
        train: what it learns on, without labels.
        held_out: images by which learning rates are chosen.
        test: images and labels.
        epochs: of training; a reduced form has a tenth.
        limit: how many of the training inputs are used; None for all.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: tuple[str, ...],
        train: TensorSplit,
        held_out: Tensor,
        test: list[tuple[Tensor, Tensor]],
        epochs: int,
        limit: int | None = None,
    ) -> None:
        self.model, self.layers, self.train, self.test = model.eval(), layers, train, test
        self.held_out, self.epochs, self.limit = held_out, epochs, limit
        found = weft.survey(model, inputs(train.batches(500, limit=limit or 8000)), shown=False)
        self.survey = replace(found, layers={name: found.layers[name] for name in layers})
        self.dense = accuracy(self.model, self.test)

    def plan(self, family: str, share: float) -> dict[str, Structure]:
        """For every layer the member of a family that is nearest, with at most a share of the parameters."""
        return {name: self._nearest(family, share, layer) for name, layer in self.survey.layers.items()}

    def _nearest(self, family: str, share: float, layer: LayerSurvey) -> Structure:
        members = list(FAMILIES[family](layer, int(share * layer.weight.numel())))
        if not members:
            raise NoMember(f"no {family} has {share:g} of the parameters of a {layer.shape} weight")
        if len(members) == 1:
            return members[0]

        def error(structure: Structure) -> float:
            fit = structure.fit(layer.weight, input_gram=layer.input_gram)
            return relative_error(layer.weight, fit, input_gram=layer.input_gram)

        return min(members, key=error)

    def scheme(self, seed: int, epochs: int) -> FineTune:
        return FineTune.of(epochs=epochs, seed=seed, rates=RATES, trial_steps=20, temperature=1.0)

    def training(self, seed: int) -> dict[str, Any]:
        """What every training gets: the dense network as teacher, and how well its scores are met."""
        return {
            "batches": self.train.batches(100, shuffle=True, seed=seed, limit=self.limit),
            "teacher": self.model,
            "validation": lambda model: -float(OBJECTIVE(model, self.held_out, self.model)),
            "shown": False,
        }


def classifier(
    model: nn.Linear, source: tuple[Batches, Batches, Batches], classes: int | None, epochs: int
) -> Task:
    """A layer alone, which its inputs are given to.

    Args:
        model: the layer.
        source: its inputs in training, those held out, and those of the test images, all with labels.
        classes: the number of a random set of classes; None for all.
        epochs: of training.
    """
    parts = []
    for batches in source:
        given, labels = zip(*batches, strict=True)
        parts.append((torch.cat(given).float(), torch.cat(labels)))
    if classes is not None:
        generator = torch.Generator().manual_seed(classes)
        chosen = torch.randperm(model.out_features, generator=generator)[:CLASSES].sort().values
        whole = model
        model = nn.Linear(whole.in_features, len(chosen))
        with torch.no_grad():
            model.weight.copy_(whole.weight[chosen])
            model.bias.copy_(whole.bias[chosen])
        own = [torch.isin(labels, chosen) for _, labels in parts]
        parts = [
            (given[mine], torch.searchsorted(chosen, labels[mine]))
            for (given, labels), mine in zip(parts, own, strict=True)
        ]
    train, held_out, test = parts
    return Task(model, ("",), TensorSplit(*train), held_out[0], [test], epochs)


def layer_inputs(model: nn.Module, layer: str, batches: Batches) -> list[tuple[Tensor, Tensor]]:
    """What a layer of a network is given for images, with their labels."""
    seen: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    labels = []
    with torch.inference_mode():
        for images, own in track(batches, f"inputs of {layer}"):
            model(images)
            labels.append(own)
    hook.remove()
    return [(given.clone(), own) for given, own in zip(seen, labels, strict=True)]


class Networks:
    """The tasks by name.

    Args:
        model: another network than MobileNetV2's classifier, as `load_model` takes it.
        layer: the name of its linear layer.
        data: its images.
        quick: whether to train for a tenth of the epochs.
    """

    def __init__(self, model: str | None, layer: str, data: str | None, quick: bool) -> None:
        self.name, self.quick = model or CLASSIFIER, quick
        if model is None:
            self.linear = mobilenet_v2_classifier()
            crops, images = imagenet_crops(), imagenet_features()
            self.source: tuple[Any, Any, Any] = (
                crops.batches("train", batch_size=1000),
                images.batches("train", batch_size=1000),
                images.batches("test", batch_size=1000),
            )
            return
        whole, given = load_model(model), load_data(data or "")
        self.linear = copy.deepcopy(whole.get_submodule(layer))
        if not isinstance(self.linear, nn.Linear):
            raise TypeError(f"{layer} of {model} is no linear layer but {type(self.linear).__name__}")
        held_out, train = given.split("train").divide(0.1, 100)  # type: ignore[attr-defined]
        parts = train, held_out, given.batches("test", batch_size=100)
        self.source = tuple(layer_inputs(whole, layer, part) for part in parts)

    @cache  # noqa: B019  (there is one)
    def task(self, name: str, classes: int | None = None) -> Task:
        if name == LENET:
            dense, data = network(LENET, self.quick)
            held_out = torch.cat([images for images, _ in data.parts["held out"]])
            epochs = 1 if self.quick else 3
            return Task(dense, ("1", "3"), data.train, held_out, data.parts["test"], epochs, data.limit)
        epochs = 40 if classes is not None else 15
        return classifier(self.linear, self.source, classes, epochs // 10 if self.quick else epochs)


# ------------------------------------------------------------------------------------------------------------
# The rows


def described(small: nn.Module, log: list[dict[str, Any]], task: Task) -> dict[str, Any]:
    weights = sum(layer.weight.numel() for layer in task.survey.layers.values())
    return {
        "structures": {entry["layer"]: entry["structure"] for entry in log},
        "share": sum(entry["parameters"] for entry in log) / weights,
        "network_share": network_cost(small).parameters / network_cost(task.model).parameters,
        "error": [entry["error"] for entry in log],
        "dense": task.dense,
    }


def first_row(given: Callable[[], Task], family: str, seed: int) -> dict[str, Any]:
    """Figure 1 for one family and one seed."""
    task = given()
    plan = task.plan(family, SHARE)
    approximated, log = weft.compress(task.model, plan, task.survey, shown=False)
    scheme, options = task.scheme(seed, task.epochs), task.training(seed)
    trained, _ = scheme.run(approximated, **options)
    scratch, _ = FromScratch(scheme).run(task.model, plan, survey=task.survey, **options)
    plain, _ = weft.compress(task.model, plan, shown=False)
    ways = {"plain": plain, "approximated": approximated, "trained": trained, "scratch": scratch}
    found = {name: accuracy(model, task.test) for name, model in ways.items()}
    return {**described(approximated, log, task), "epochs": task.epochs, **found}


def second_row(given: Callable[[], Task], family: str, share: float) -> dict[str, Any]:
    """Figure 2 for one family and share; a row that says so where the family has nothing as small."""
    task = given()
    try:
        plan = task.plan(family, share)
    except NoMember as none:
        return {"missing": str(none)}
    approximated, log = weft.compress(task.model, plan, task.survey, shown=False)
    epochs = max(1, task.epochs // 3)
    trained, _ = task.scheme(0, epochs).run(approximated, **task.training(0))
    plain, _ = weft.compress(task.model, plan, shown=False)
    return {
        **described(approximated, log, task),
        "epochs": epochs,
        "plain": accuracy(plain, task.test),
        "approximated": accuracy(approximated, task.test),
        "trained": accuracy(trained, task.test),
    }


def time_row(task: Task, structures: Mapping[str, Any]) -> dict[str, Any]:
    """Time of one image on one thread, by random members of these sizes and dense, in turns."""
    plan = {layer: structure_from_json(data) for layer, data in structures.items()}
    structured = FromScratch().initialise(task.model, plan, task.survey).eval()
    x = task.held_out[:1]
    with threads(1), torch.inference_mode():
        calls = {"dense": partial(task.model, x), "structured": partial(structured, x)}
        times = time_alternating(calls, seconds=0.5)
    return {
        "seconds": times["structured"].median,
        "dense_seconds": times["dense"].median,
        "over_dense": times["structured"].median / times["dense"].median,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", help="another network: torchvision:NAME, or FILE.py:FUNCTION")
    options.add_argument("--layer", default="", help="the name of its classifier, a linear layer")
    options.add_argument("--data", help="its data: imagefolder:DIR, ...")
    given = options.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    try:
        if given.model is None:
            shared_file("mnist/mnist.npz")
        tasks = Networks(given.model, given.layer, given.data, given.quick)
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        sys.exit(0)
    records = Records("kissel_diepold", fresh=given.fresh, quick=given.quick)
    seeds, sets = (1, 1) if given.quick else (SEEDS, SETS)
    few = tasks.linear.out_features <= CLASSES
    first: list[tuple[str, int | None]] = [(tasks.name, None if few else number) for number in range(sets)]
    networks = [tasks.name]
    if given.model is None:
        first.append((LENET, None))
        networks.append(LENET)
    shares = SHARES[:2] if given.quick else SHARES
    # Each figure's rough form first: an interrupted run has something of all.
    rows: list[tuple[int, Callable[[], Any]]] = []
    for seed, (name, number), family in product(range(seeds), first, FAMILIES):
        key = {"network": name, "classes": number, "family": family}
        make = partial(first_row, partial(tasks.task, name, number), family, seed)
        rows.append((seed, partial(records.row, "figure 1", key, make, seed=seed)))
    # The reduced form has its one set of classes in figure 2 as well.
    numbers = dict(first) if given.quick else dict.fromkeys(networks)
    for (place, share), name, family in product(enumerate(shares), networks, FAMILIES):
        key = {"network": name, "family": family, "share_asked": share}
        make = partial(second_row, partial(tasks.task, name, numbers[name]), family, share)
        rows.append((place // 2, partial(records.row, "figure 2", key, make)))
    for _, run in track(sorted(rows, key=itemgetter(0)), "figures 1 and 2"):
        run()
    for row in track(measured_shares(records), "times"):
        key = {name: row[name] for name in ("network", "family", "share_asked")}
        task = tasks.task(row["network"], numbers[row["network"]])
        records.row("time", key, partial(time_row, task, row["structures"]))
    show(sheets(records))


def measured_shares(records: Records) -> list[dict[str, Any]]:
    """The rows of figure 2 that have a network."""
    return [row for row in records.of("figure 2") if "missing" not in row]


def sheets(records: Records) -> Iterator[Sheet]:
    """The paper's figures as tables."""
    first = records.of("figure 1")
    table = []
    for name, family in dict.fromkeys((row["network"], row["family"]) for row in first):
        rows = [row for row in first if (row["network"], row["family"]) == (name, family)]
        cells = [name, family, f"{statistics.mean(row['share'] for row in rows):.3f}"]
        for way in ("dense", "plain", "approximated", "trained", "scratch"):
            values = [row[way] for row in rows]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        table.append([*cells, str(len(rows))])
    yield Sheet(
        f"Figure 1: layers at {SHARE:.0%} of their parameters, top-1, mean and deviation",
        (
            "network",
            "family",
            "share",
            "dense",
            "approximated",
            "weighted",
            "and trained",
            "from scratch",
            "runs",
        ),
        table,
        f"Of {CLASSES} classes each where the network is a classifier, over sets of classes and seeds. The "
        "paper gives curves and no numbers; its finding is that approximation followed by training predicts "
        "best. The paper's approximations know the weights alone, as the plain ones here; a classifier "
        "learns from the features of 800 crops where the paper has whole classes of ImageNet, so that a "
        "random start ends lower and training adds less. LeNet-300-100 learns from all of MNIST, and there a "
        "random start ends about as high.",
    )
    times = {
        tuple(row[name] for name in ("network", "family", "share_asked")): row for row in records.of("time")
    }

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["network"] == LENET, list(FAMILIES).index(row["family"]), row["share_asked"]

    def over_dense(row: dict[str, Any]) -> str:
        timed = times.get((row["network"], row["family"], row["share_asked"]))
        return "-" if timed is None else f"{timed['over_dense']:.2f}"

    if not measured_shares(records):
        return
    yield Sheet(
        "Figure 2: by the share of the layers' parameters",
        (
            "network",
            "family",
            "share",
            "error",
            "dense",
            "approximated",
            "weighted",
            "and trained",
            "time, one image, of dense",
        ),
        [
            (
                row["network"],
                row["family"],
                f"{row['share']:.3f}",
                " / ".join(f"{error:.3f}" for error in row["error"]),
                f"{row['dense']:.3f}",
                f"{row['plain']:.3f}",
                f"{row['approximated']:.3f}",
                f"{row['trained']:.3f}",
                over_dense(row),
            )
            for row in sorted(measured_shares(records), key=place)
        ],
        "Time of the network's call on one thread, in turns with the dense one's. The paper times a plain C "
        "loop for both, where time follows the multiply-adds; a tuned dense product is harder to beat.",
    )


if __name__ == "__main__":
    main()
