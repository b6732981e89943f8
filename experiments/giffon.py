"""PSM-nets (Giffon, Ayache, Kadri, Artières and Sicre 2021): figures 3 and 4, tables I, III and IV.

    python experiments/giffon.py            # an epoch each, pruning in two steps: half an hour of a core
    python experiments/giffon.py --quick    # a tenth of the images and half of the grid: five minutes

LeNet-5 on MNIST and ResNet-20 on CIFAR-10; the first layer stays dense, as does ResNet-20's classifier of 640
weights. "figure 3": how near products of Q factors with K entries per line come to every layer, as published
(PALM4MSA) and by our search. "network": a compressed network, trained: products of sparse matrices from the
fit, from its supports with fresh values, and all at random (table III), and from our weighted fit; tensor
trains of four cores; Tucker with ranks by VBMF on convolutions and 10 or 20 % of the singular values of
linear layers; magnitude pruning at once and in steps, at 95 and 98 % of every layer. All learn from labels
by the paper's protocol: RMSProp for LeNet, Adam for the ResNet with moved and mirrored images, the learning
rate from 1e-3, 1e-4 and 1e-5 after ten steps by 1,000 held-out training images. "memory": what one image
takes inside the layers while it passes (table I). Accuracy is that on the test images.

Rows go on from their checkpoints under build/ where they were interrupted. Writes
experiments/results/giffon.json, or giffon_quick.json. Skips where the data folder is absent.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from data import shared_file
from learning_compression import EVALUATED, Images, network
from psm_nets import PUBLISHED_RATE, protocol
from records import Records, Sheet, parser, show
from torch import Tensor, nn

import weft
from weft.measure import accuracy, footprint, network_cost, peak_activations
from weft.progress import track
from weft.schemes.from_scratch import FromScratch
from weft.schemes.iterative_pruning import IterativePruning
from weft.sources.augmentation import Augmented
from weft.structures.base import Shape, Structure, matrix_shape, relative_error
from weft.structures.low_rank import LowRank
from weft.structures.pruned import Pruned
from weft.structures.sparse_product import SparseProduct
from weft.structures.tensor_train import TensorTrain
from weft.structures.tucker import Tucker

BUILD = Path(__file__).parents[1] / "build" / "giffon"
LENET, RESNET = "LeNet-5", "ResNet-20"
OPTIMISER = {LENET: "rmsprop", RESNET: "adam"}
EPOCHS = 1
SIZES = ((2, 2), (2, 14), (3, 2), (3, 14))
RANKS, KEPT, DENSITIES = (6, 10, 14), (0.1, 0.2), (0.05, 0.02)
PRUNING_STEPS = 2
POINTS = 5.0
# Table III in percent: the dense network, then by size the fit, fresh values and all at random; found in the
# authors' repository (github.com/lucgiffon/psm-nets). Their ResNet-20 is one for CIFAR-100.
PUBLISHED = {
    LENET: (99, {(2, 2): (99, 99, 98), (2, 14): (99, 99, 99), (3, 2): (99, 98, 98), (3, 14): (99, 99, 99)}),
    RESNET: (73, {(2, 2): (56, 53, 48), (2, 14): (69, 63, 62), (3, 2): (57, 48, 29), (3, 14): (70, 60, 60)}),
}
OURS = "weighted fit"
NAMES = {"fitted": "PSM", "supports": "PSM re-init", "random": "PSM random", OURS: "PSM, weighted fit"}
BATCH, HELD_OUT = 16, 1000


# ------------------------------------------------------------------------------------------------------------
# What is asked


def compressed_layers(name: str, survey: weft.Survey) -> dict[str, Shape]:
    """The layers that get structure, with their shapes."""
    _, *rest = survey.layers
    return {layer: survey.layers[layer].shape for layer in rest if (name, layer) != (RESNET, "linear")}


def sparse_product(shape: Shape, factors: int, sparsity: int, algorithm: str = "palm4msa") -> SparseProduct:
    """The product asked for, with fewer entries where they were more than half of a small layer's numbers."""
    rows, columns = matrix_shape(shape)
    lines = sum(map(max, SparseProduct(factors, 1).factor_shapes(shape)))
    most = max(1, rows * columns // (2 * lines))
    return SparseProduct(factors, min(sparsity, most, rows, columns), algorithm)


def tucker_svd(shape: Shape, kept: float) -> Structure | None:
    """VBMF's ranks of a kernel, a share of a matrix's singular values; a classifier of 10 rows stays."""
    if len(shape) > 2:
        return Tucker("vbmf")
    return LowRank(round(kept * min(shape))) if min(shape) > 10 else None


# Methods by name: the settings to run and, of each, the structure of a layer.
Method = Callable[[Shape, Any], Structure | None]
METHODS: Mapping[str, tuple[tuple[Any, ...], Method]] = {
    **{
        name: (
            SIZES,
            lambda shape, size, way=way: sparse_product(
                shape, *size, "splitting" if way == OURS else "palm4msa"
            ),
        )
        for way, name in NAMES.items()
    },
    "TT": (RANKS, lambda shape, rank: TensorTrain(rank, cores=4)),
    "Tucker-SVD": (KEPT, tucker_svd),
    "hard pruning": (DENSITIES, lambda shape, density: Pruned(density)),
    "iterative pruning": (DENSITIES, lambda shape, density: Pruned(density)),
    "dense, trained further": ((None,), lambda shape, _: None),
}

IN_MEMORY = ("dense, trained further", NAMES["fitted"], "TT", "Tucker-SVD")


def plan(name: str, survey: weft.Survey, method: str, setting: Any) -> dict[str, Structure]:
    """The structures of a network's layers."""
    make = METHODS[method][1]
    made = {layer: make(shape, setting) for layer, shape in compressed_layers(name, survey).items()}
    return {layer: structure for layer, structure in made.items() if structure is not None}


def described(setting: Any) -> str:
    """A setting as it is printed."""
    match setting:
        case [factors, sparsity]:
            return f"Q={factors}, K={sparsity}"
        case int():
            return f"R={setting}"
        case None:
            return "-"
        case _:
            return f"{setting:.0%}"


# ------------------------------------------------------------------------------------------------------------
# The rows


def test_accuracy(model: nn.Module, data: Images) -> float:
    """In percent, on the test images."""
    model.eval()
    return 100 * accuracy(model, data.parts["test"], shown=False)


@cache
def dense_accuracy(name: str, quick: bool) -> float:
    return test_accuracy(*network(name, quick))


def batches(name: str, data: Images) -> Any:
    """Training batches by the protocol."""
    return data.batches() if name == LENET else Augmented(data.batches(), shift=4, flip=True)


def network_row(name: str, method: str, setting: Any, quick: bool) -> dict[str, Any]:
    """One network: compressed and trained."""
    dense, data = network(name, quick)
    epochs = EPOCHS
    survey = weft.survey(dense, data.calibration() if method == NAMES[OURS] else None, shown=False)
    structures = plan(name, survey, method, setting)
    folder = BUILD / re.sub(r"\W+", "_", f"{name} {method} {setting} {epochs}{' quick' if quick else ''}")
    BUILD.mkdir(parents=True, exist_ok=True)
    scheme = protocol(epochs, OPTIMISER[name], quick)
    options: dict[str, Any] = {
        "validation": data.parts["held out"][: HELD_OUT // EVALUATED],
        "checkpoint": folder,
        "shown": False,
    }
    ways = {name: way for way, name in NAMES.items()}
    untrained = None
    if ways.get(method) in ("supports", "random"):
        scratch = FromScratch(scheme, ways[method])
        small, log = scratch.run(dense, structures, batches(name, data), survey=survey, **options)
    else:
        corrected = data.calibration() if method == NAMES[OURS] else None
        small, _ = weft.compress(dense, structures, survey, batches=corrected, shown=False)
        untrained = test_accuracy(small, data)
        if method == "iterative pruning":
            epochs = max(PRUNING_STEPS, epochs)
            steps = IterativePruning(protocol(1, OPTIMISER[name], quick).training, steps=epochs)
            small, log = steps.run(dense, structures, batches(name, data), **options)
        else:
            small, log = scheme.run(small, batches(name, data), **options)
    parameters, whole = network_cost(small).parameters, network_cost(dense).parameters
    return {
        "epochs": epochs,
        "images": data.limit or len(data.train),
        "structures": {layer: str(structure) for layer, structure in structures.items()},
        "parameters": parameters,
        "rate": whole / parameters,
        "rate_of_bytes": footprint(dense).stored / footprint(small).stored,
        "untrained": untrained,
        "accuracy": test_accuracy(small, data),
        "dense": dense_accuracy(name, quick),
        "training_seconds": log[-1].get("seconds"),
    }


def error_row(name: str, layer: str, factors: int, sparsity: int, quick: bool) -> dict[str, Any]:
    """Figure 3 for one layer and size."""
    dense, _ = network(name, quick)
    weight = weft.survey(dense, shown=False).layers[layer].weight.detach()
    found: dict[str, Any] = {"shape": list(weight.shape)}
    for algorithm in ("palm4msa", "splitting"):
        structure = sparse_product(tuple(weight.shape), factors, sparsity, algorithm)
        member = structure.fit(weight)
        error = relative_error(weight, member)
        found |= {
            f"{algorithm}_error": error,
            f"{algorithm}_squared": error**2,
            f"{algorithm}_rate": weight.numel() / member.parameter_count(),
        }
    return found | {"sparsity_taken": structure.sparsity}


def hidden(structure: Structure, shape: Shape) -> int:
    """The most numbers that there are between two factors or cores, of one vector or position."""
    if isinstance(structure, SparseProduct):
        return min(matrix_shape(shape))
    if not isinstance(structure, TensorTrain):
        return 0
    # From the last core, which is the kernel's, to the first: behind core k stand the outputs of the cores
    # from k on, the inputs of those before, and the rank between.
    cores = structure.core_shapes(shape)
    return max(
        math.prod(core[1] for core in cores[k:]) * math.prod(core[2] for core in cores[:k]) * cores[k][0]
        for k in range(1, len(cores))
    )


def memory_row(name: str, method: str, setting: Any, quick: bool) -> dict[str, Any]:
    """Table I: what an image takes inside each compressed layer, and inside the network, in bytes."""
    dense, data = network(name, quick)
    images = data.parts["test"][0][0][:BATCH]
    survey = weft.survey(dense, [images], shown=False)
    structures = plan(name, survey, method, setting)
    small, _ = weft.compress(dense, structures, shown=False)
    between = 0
    for layer, structure in structures.items():
        own = survey.layers[layer]
        positions = own.geometry.positions(own.shape[2:]) if own.geometry else 1
        between = max(between, 4 * positions * hidden(structure, own.shape))
    seen: dict[str, Tensor] = {}

    def remember(layer: str) -> Callable[..., None]:
        return lambda _, given: seen.update({layer: given[0]})

    chosen = compressed_layers(name, survey)
    handles = [small.get_submodule(layer).register_forward_pre_hook(remember(layer)) for layer in chosen]
    with torch.inference_mode():
        small(images)
    for handle in handles:
        handle.remove()
    layers = {layer: peak_activations(small.get_submodule(layer), given) for layer, given in seen.items()}
    return {
        "between": between,
        "layers": layers,
        "largest": max(layers.values()),
        "peak": peak_activations(small, images),
    }


def settings(method: str, quick: bool) -> tuple[Any, ...]:
    """A method's settings; of the reduced form one, or two sizes that have both numbers of either kind."""
    found = METHODS[method][0]
    if not quick:
        return found
    return found[1:3] if found == SIZES else found[:1]


def layers_shown(name: str, quick: bool) -> list[str]:
    """The layers of figure 3; of the reduced form every fourth one of the ResNet."""
    layers = list(weft.survey(network(name, quick)[0], shown=False).layers)
    return layers[::4] if quick and name == RESNET else layers


def wanted(quick: bool) -> Iterator[tuple[str, str, Any]]:
    """The networks to train: those of the reduced form first, so that an interrupted run has most tables."""
    found = [
        (name, method, setting)
        for method in METHODS
        for setting in settings(method, quick)
        for name in (LENET, RESNET)
    ]
    rough = [
        (name, method, setting) for name, method, setting in found if setting in settings(method, quick=True)
    ]
    yield from dict.fromkeys([*rough, *found])


def main() -> None:
    given = parser(__doc__).parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    try:
        shared_file("mnist/mnist.npz")
        shared_file("cifar10/resnet20.npz")
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        sys.exit(0)
    records = Records("giffon", fresh=given.fresh, quick=given.quick)
    for name in (LENET, RESNET):
        pairs = list(product(layers_shown(name, given.quick), settings(NAMES["fitted"], given.quick)))
        for layer, size in track(pairs, f"figure 3, {name}"):
            key = {"network": name, "layer": layer, "factors": size[0], "sparsity": size[1]}
            records.row("figure 3", key, partial(error_row, name, layer, *size, given.quick))
        for method in IN_MEMORY:
            for setting in settings(method, given.quick):
                key = {"network": name, "method": method, "setting": setting}
                records.row("memory", key, partial(memory_row, name, method, setting, given.quick))
    for name, method, setting in track(list(wanted(given.quick)), "networks"):
        key = {"network": name, "method": method, "setting": setting}
        records.row("network", key, partial(network_row, name, method, setting, given.quick))
    show(sheets(records))


# ------------------------------------------------------------------------------------------------------------
# The paper's tables


KEYS = ("part", "network", "layer", "factors", "sparsity", "method", "setting")


REDUCED = "*: of the reduced form, which learns from a tenth of the images and is judged by 1,000."


def page(records: Records) -> Iterator[Sheet]:
    """The paper's figures and tables, with rows of the reduced form where the full one has none yet."""
    known = {json.dumps([row.get(key) for key in KEYS]) for row in records.rows}
    for row in Records("giffon", quick=True).rows:
        if json.dumps([row.get(key) for key in KEYS]) not in known:
            records.rows.append({**row, "reduced": True})
    return sheets(records)


def marked(row: dict[str, Any]) -> str:
    """The accuracy of a row, in percent."""
    return f"{row['accuracy']:.2f}{'*' if row.get('reduced') else ''}"


def sheets(records: Records) -> Iterator[Sheet]:
    """The paper's figures and tables."""
    yield figure_3(records)
    rows = records.of("network")
    yield table_3(rows)
    yield Sheet(
        "Figure 4: accuracy by parameters",
        (
            "network",
            "method",
            "setting",
            "parameters",
            "rate",
            "of bytes",
            "untrained, %",
            "trained, %",
            "lost",
            "epochs × images",
        ),
        [
            (
                row["network"],
                row["method"],
                described(row["setting"]),
                f"{row['parameters']:,}",
                f"{row['rate']:.1f}",
                f"{row['rate_of_bytes']:.1f}",
                "-" if row["untrained"] is None else f"{row['untrained']:.2f}",
                marked(row),
                f"{row['dense'] - row['accuracy']:+.2f}",
                f"{row['epochs']} × {row['images']:,}",
            )
            for row in sorted(rows, key=lambda row: (row["network"], row["parameters"]))
        ],
        "Rates are those of the whole network's parameters, as published; those of bytes count the places of "
        f"entries too. Training is short here. {REDUCED}",
    )
    yield table_4(rows)
    yield table_1(records.of("memory"))


def figure_3(records: Records) -> Sheet:
    found: dict[tuple[str, str], dict[tuple[int, int], dict[str, Any]]] = {}
    for row in records.of("figure 3"):
        size = row["factors"], row["sparsity"]
        found.setdefault((row["network"], row["layer"]), {})[size] = row

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return "-"
        return (
            f"{row['palm4msa_squared']:.3f} ({row['palm4msa_error']:.3f}); "
            f"{row['splitting_squared']:.3f} ({row['splitting_error']:.3f})"
        )

    return Sheet(
        "Figure 3: ‖W − Ŵ‖² / ‖W‖² as published, in brackets its root, our measure; PALM4MSA; our search",
        ("network", "layer", "shape", *(described(size) for size in SIZES)),
        [
            (
                network,
                layer,
                "×".join(map(str, next(iter(sizes.values()))["shape"])),
                *(cell(sizes.get(size)) for size in SIZES),
            )
            for (network, layer), sizes in found.items()
        ],
        "More entries help much, a third factor little. In a layer so small that K entries per line were "
        "more than half of its numbers there are fewer.",
    )


def table_3(rows: list[dict[str, Any]]) -> Sheet:
    found = {
        (row["network"], row["method"], tuple(row["setting"] or ())): row
        for row in rows
        if row["method"] in NAMES.values()
    }
    keys = sorted({(network, setting) for network, _, setting in found})

    def cell(network: str, way: str, setting: tuple[int, ...]) -> str:
        row = found.get((network, NAMES[way], setting))
        own = "-" if row is None else marked(row)
        _, published = PUBLISHED[network]
        return own if way == OURS else f"{own} ({published[setting][list(NAMES).index(way)]})"

    def dense(network: str) -> str:
        own = next(
            row["dense"]
            for row in sorted(rows, key=lambda row: row.get("reduced", False))
            if row["network"] == network
        )
        return f"{own:.2f} ({PUBLISHED[network][0]})"

    return Sheet(
        "Table III: accuracy in % after training, by the start, published figures in brackets",
        ("network", "size", *NAMES.values(), "dense"),
        [
            (
                network,
                described(list(setting)),
                *(cell(network, way, setting) for way in NAMES),
                dense(network),
            )
            for network, setting in keys
        ],
        "The fit is the start that the paper proposes, fresh values and random supports are its controls. "
        "The published ResNet-20 is one for CIFAR-100's 100 classes; ours learns for one epoch of a third of "
        f"CIFAR-10, and the less training there is the more the start decides. {REDUCED}",
    )


def table_4(rows: list[dict[str, Any]]) -> Sheet:
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["network"], row["method"]
        if row["dense"] - row["accuracy"] <= POINTS and (key not in best or row["rate"] > best[key]["rate"]):
            best[key] = row
    table = []
    for name, method in dict.fromkeys((row["network"], row["method"]) for row in rows):
        row = best.get((name, method))
        published = f"{PUBLISHED_RATE} without loss" if (name, method) == (LENET, "PSM") else "-"
        if row is None:
            table.append((name, method, "none", "-", "-", published))
            continue
        lost = f"{row['dense'] - row['accuracy']:+.2f}{'*' if row.get('reduced') else ''}"
        table.append((name, method, f"{row['rate']:.1f}", described(row["setting"]), lost, published))
    return Sheet(
        f"Table IV: the largest rate at no more than {POINTS:g} points lost",
        ("network", "method", "rate", "setting", "points lost", "published"),
        table,
        "Among the settings above alone; the paper's other networks (VGG-19, ResNets on CIFAR-100) are not "
        "at hand. `experiments/psm_nets.py` follows the rate without loss.",
    )


def table_1(rows: list[dict[str, Any]]) -> Sheet:
    dense = {row["network"]: row for row in rows if row["setting"] is None}

    def over(row: dict[str, Any], what: str) -> str:
        return f"{row[what] / 1024:.1f} KiB ({row[what] / dense[row['network']][what]:.2f})"

    return Sheet(
        "Table I: memory that one image takes while it passes, in brackets over the dense network's",
        ("network", "method", "setting", "between factors", "inside a layer", "at the network's peak"),
        [
            (
                row["network"],
                "dense" if row["setting"] is None else row["method"],
                described(row["setting"]),
                f"{row['between'] / 1024:.1f} KiB" if row["between"] else "-",
                over(row, "largest"),
                over(row, "peak"),
            )
            for row in rows
        ],
        "Of the layer where it is most. Between factors: the numbers that there are between two cores or "
        "factors where they are applied one by one; else measured by torch at "
        f"batch {BATCH}, the result included. A chain that is no cheaper than the dense kernel is multiplied "
        "out, as products of sparse matrices are on convolutions, and then takes no more memory than that.",
    )


if __name__ == "__main__":
    main()
