"""Learning-compression against direct compression and as much fine-tuning, on MNIST and CIFAR-10.

    python experiments/learning_compression.py                    # everything that is not measured yet
    python experiments/learning_compression.py "ranks by price"   # one row
    python experiments/learning_compression.py --fresh            # measured again

LeNet-300-100 and LeNet-5 are trained here (55,000 images), ResNet-20 is given. For every row the network is
compressed by the LC algorithm and fine-tuned for half as many epochs; the structures that came out are also
fitted to the reference network directly and fine-tuned for as many epochs as both together, so that cost and
training are the same. Settings were chosen on 5,000
held-out training images; what is printed are errors on the test images.

Every run goes on from its checkpoint under build/ where it was interrupted; a finished row is kept in
experiments/results/learning_compression.json and not run again. Skips where the data folder is absent.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from data import cifar10, mnist, shared_file
from models import lenet_5, lenet_300_100
from rich.console import Console
from rich.table import Table
from torch import nn

import weft
from weft.bench import surroundings
from weft.measure import accuracy, footprint, inputs, network_cost
from weft.plan.budget import Budget, Price
from weft.schemes.fine_tune import FineTune
from weft.schemes.learning_compression import (
    Added,
    LearningCompression,
    Priced,
    Task,
    Together,
    Within,
    rising,
)
from weft.schemes.training import Training
from weft.sources import Data, load_model
from weft.sources.splits import TensorSplit, hold_out
from weft.storage import structured_layers, write_text
from weft.structures.base import Structure
from weft.structures.low_rank import LowRank
from weft.structures.pruned import Pruned
from weft.structures.quantized import Quantized
from weft.structures.reshaped import Reshaped
from weft.structures.sparse_product import SparseProduct

HERE = Path(__file__).parent
WORK = HERE.parent / "build" / "learning_compression"
RESULTS = HERE / "results" / "learning_compression.json"


# ------------------------------------------------------------------------------------------------------------
# Data and reference networks


class Images:
    """A data set: images to train on, a twelfth of them held out to choose by, test images to report on."""

    def __init__(self, data: Data, batch_size: int) -> None:
        ((images, labels),) = data.batches("train", batch_size=10**6)
        train, held_out = hold_out(TensorSplit(images, labels), 1 / 12)
        assert train is not None
        assert held_out is not None
        self.train, self.batch_size = train, batch_size
        self.parts = {
            "test": list(data.batches("test", batch_size=1000)),
            "held out": list(held_out.batches(1000)),
        }

    def batches(self) -> Any:
        """Training batches, every pass in another order; the same passes for every caller."""
        return self.train.batches(self.batch_size, shuffle=True)

    def calibration(self) -> Any:
        """Some training images without labels."""
        return inputs(self.train.batches(256, limit=2048))

    def errors(self, model: nn.Module) -> dict[str, float]:
        """Errors in percent, on the test images and on those held out."""
        model.eval()
        return {part: 100 * (1 - accuracy(model, images, shown=False)) for part, images in self.parts.items()}


def trained(make: Callable[[], nn.Module], training: Training, data: Images) -> nn.Module:
    """A reference network; its training is kept under build/ and done once."""
    torch.manual_seed(0)
    scheme, folder = FineTune(training), WORK / make.__name__
    WORK.mkdir(parents=True, exist_ok=True)
    return scheme.run(make(), data.batches(), checkpoint=folder).model.eval()


@cache
def network(name: str) -> tuple[nn.Module, Images]:
    """A reference network and its data."""
    if name == "LeNet-300-100":
        data = Images(mnist(), 256)
        return trained(lenet_300_100, Training(40, 0.05, 1e-4, "sgd"), data), data
    if name == "LeNet-5":
        data = Images(mnist(), 128)
        return trained(lenet_5, Training(15, 0.02, 1e-4, "sgd"), data), data
    model = load_model(f"{HERE / 'models.py'}:resnet20", shared_file("cifar10/resnet20.npz"))
    return model.eval(), Images(cifar10(), 128)


# ------------------------------------------------------------------------------------------------------------
# The rows


@dataclass(frozen=True)
class Row:
    """One compression.

    Attributes:
        network: which reference.
        tasks: the C steps.
        scheme: the L steps and penalties.
        published: the error in percent that the LC library's page gives, where its reference has 2.13.
    """

    network: str
    tasks: Mapping[str, Task | Structure]
    scheme: LearningCompression
    published: float | None = None


def scheme(first: float, factor: float, steps: int = 20, **options: Any) -> LearningCompression:
    """L steps of one epoch of stochastic gradient descent, as the library's examples have (there 20)."""
    training = Training(1, 0.1, optimiser="sgd", schedule="constant")
    return LearningCompression(training, rising(first, factor, steps), 0.97, **options)


# Levels: the quadratic penalty, whose steps all weights feel alike where the optimiser scales them.
LEVELS = LearningCompression(
    Training(1, optimiser="adam", schedule="constant"), rising(1e-4, 1.5, 20), 0.97, multipliers=False
)
BINARY = Quantized(1, codebook="kmeans")
REFERENCE_ERROR = 2.13
ROWS = {
    # https://github.com/UCMerced-ML/LC-model-compression/tree/master/examples/lenet300
    "5 % of all weights": Row("LeNet-300-100", {"*": Together(Pruned(0.05))}, scheme(2e-4, 1.3), 2.18),
    "1-bit codebooks": Row("LeNet-300-100", {"*": BINARY}, LEVELS, 2.56),
    "1 % + 1-bit codebooks": Row(
        "LeNet-300-100", {"*": Added((Together(Pruned(0.01)), BINARY))}, LEVELS, 2.17
    ),
    "ranks by price": Row(
        "LeNet-300-100", {"*": Priced("LowRank", Price(parameters=1e-6))}, scheme(1e-3, 1.15), 1.90
    ),
    # Further schemes.
    "2 % of all weights, 4 bits": Row(
        "LeNet-300-100",
        {"*": Together(Quantized(4, of=Pruned(0.02), codebook="kmeans"))},
        scheme(2e-4, 1.3),
    ),
    "low rank, plain + reshaped": Row(
        "LeNet-300-100",
        {
            "1": Added((LowRank(8), Reshaped(LowRank(8), 600))),
            "3": Added((LowRank(4), Reshaped(LowRank(4), 200))),
        },
        scheme(1e-3, 1.15),
    ),
    "sparse products, 23x": Row(
        "LeNet-5",
        {
            "2": SparseProduct(2, 6, "splitting"),
            "5": SparseProduct(2, 5, "splitting"),
            "7": SparseProduct(2, 3, "splitting"),
        },
        scheme(1e-3, 1.7, 8),
    ),
    **{
        f"half the multiply-adds, {family}": Row(
            "ResNet-20",
            {"layer*": Within(family, Budget(multiply_adds=0.5))},
            scheme(1e-3, 3.0, 4),
        )
        for family in ("LowRank", "Tucker")
    },
    "half the parameters, SparseProduct": Row(
        "ResNet-20", {"layer*": Within("SparseProduct", Budget(parameters=0.5))}, scheme(1e-3, 3.0, 4)
    ),
}


def run(name: str) -> dict[str, Any]:
    """Both ways to the structures of one row."""
    row = ROWS[name]
    model, data = network(row.network)
    survey = weft.survey(model, data.calibration(), shown=False)
    folder = WORK / "".join(letter if letter.isalnum() else "_" for letter in name)

    def tuned(small: nn.Module, way: str, epochs: int) -> nn.Module:
        training = Training(epochs, 1e-3)
        return FineTune(training).run(small, data.batches(), checkpoint=Path(f"{folder}_{way}")).model

    steps = len(row.scheme.penalties)
    small, log = row.scheme.run(model, row.tasks, data.batches(), survey=survey, checkpoint=folder)
    learned = tuned(small, "tuned", steps // 2)
    found = {layer: small.get_submodule(layer).matrix.structure for layer in structured_layers(small)}
    direct, _ = weft.compress(model, found, survey, batches=data.calibration())
    direct_tuned = tuned(direct, "direct", steps + steps // 2)
    sample = data.parts["test"][0][0][:1]
    return {
        "network": row.network,
        "reference": data.errors(model),
        "lc": data.errors(small),
        "lc, tuned": data.errors(learned),
        "direct": data.errors(direct),
        "direct, tuned": data.errors(direct_tuned),
        "published": row.published,
        "published_reference": REFERENCE_ERROR if row.published else None,
        "epochs": {"lc": steps, "tuned": steps // 2, "direct, tuned": steps + steps // 2},
        "distance": [entry["distance"] for entry in log if "distance" in entry][-1],
        "structures": {layer: structure.to_json() for layer, structure in found.items()},
        "rates": {
            "parameters": network_cost(model).parameters / network_cost(small).parameters,
            "bytes": footprint(model).stored / footprint(small).stored,
            "multiply_adds": network_cost(model, sample).multiply_adds
            / network_cost(small, sample).multiply_adds,
        },
        "seed": row.scheme.training.seed,
        "environment": surroundings(),
    }


def finished() -> dict[str, Any]:
    """The rows that are measured."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else {}


def show(rows: Mapping[str, dict[str, Any]]) -> None:
    """Prints the table."""
    table = Table(title="test errors in percent", title_justify="left")
    ways = ("reference", "lc", "lc, tuned", "direct", "direct, tuned")
    for heading in ("network", "what", *ways, "published", "rates"):
        table.add_column(heading)
    for name, found in rows.items():
        errors = [f"{found[way]['test']:.2f}" for way in ways]
        published = "-" if found["published"] is None else f"{found['published']:.2f} (of {REFERENCE_ERROR})"
        rates = ", ".join(f"{rate:.1f}x {what}" for what, rate in found["rates"].items())
        table.add_row(found["network"], name, *errors, published, rates)
    Console(width=160).print(table)


def main() -> None:
    """Measures what is asked for and not known yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(map(repr, ROWS))}")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    options = parser.parse_args()
    unknown = set(options.rows) - set(ROWS)
    if unknown:
        parser.error(f"no rows called {', '.join(sorted(unknown))}")
    for name in options.rows or ROWS:
        if name in finished() and not options.fresh:
            continue
        try:
            found = run(name)
        except FileNotFoundError as error:
            print(f"skipped: {error}")
            sys.exit(0)
        held = finished() | {name: found}  # another process may have added rows meanwhile
        ordered = {known: held[known] for known in ROWS if known in held}
        record = {"experiment": "learning_compression", "rows": ordered}
        write_text(RESULTS, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    held = finished()
    show({known: held[known] for known in ROWS if known in held})


if __name__ == "__main__":
    main()
