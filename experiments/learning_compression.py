"""Learning-compression against direct compression and as much fine-tuning, on MNIST and CIFAR-10.

    python experiments/learning_compression.py                    # everything that is not measured yet
    python experiments/learning_compression.py "ranks by price"   # one row
    python experiments/learning_compression.py --fresh            # measured again
    python experiments/learning_compression.py --quick            # some rows, two or three steps each

LeNet-300-100 and LeNet-5 are trained here (55,000 images), ResNet-20 is given. For every row the network is
compressed by the LC algorithm and fine-tuned for half as many epochs; the structures that came out are also
fitted to the reference network directly and fine-tuned for as many epochs as both together, so that cost and
training are the same. ResNet-20 learns from its own scores, as the images at hand are a third of those that
it was trained on. Settings were chosen on held-out training images (5,000 of MNIST); what is printed are
errors on the test images. The reduced form trains on a tenth of the images and is judged by 1,000.

Every run goes on from its checkpoint under build/ where it was interrupted; a finished row is kept in
experiments/results/learning_compression.json and not run again. Skips where the data folder is absent.
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import cifar10, mnist, shared_file
from models import lenet_5, lenet_300_100
from records import Records, Sheet, parser, show
from torch import nn

import weft
from weft.measure import accuracy, footprint, inputs, network_cost
from weft.plan.budget import Budget, Price
from weft.schemes.fine_tune import FineTune
from weft.schemes.learning_compression import (
    Added,
    LearningCompression,
    Priced,
    Task,
    Together,
    rising,
)
from weft.schemes.objective import Objective
from weft.schemes.training import Training
from weft.sources import Data, load_model
from weft.sources.augmentation import Augmented
from weft.sources.splits import TensorSplit, hold_out
from weft.storage import structured_layers
from weft.structures.base import Structure
from weft.structures.dense import Dense
from weft.structures.low_rank import LowRank
from weft.structures.pruned import Pruned
from weft.structures.quantized import Quantized
from weft.structures.reshaped import Reshaped
from weft.survey import Survey

HERE = Path(__file__).parent
NAME = "learning_compression"
WORK = HERE.parent / "build" / NAME
EVALUATED = 250  # images at once: what lies between layers stays in the caches, which halves ResNet-20's time


# ------------------------------------------------------------------------------------------------------------
# Data and reference networks


class Images:
    """A data set: images to train on, a twelfth of them held out to choose by, test images to report on.

    Args:
        data: where they come from.
        batch_size: of the training.
        share: of the training images that are used; where it is not all of them, 1,000 images at most are
            tested on.
        calibrated: how many of them the survey sees.
        flip: whether half of them are mirrored while training.
    """

    def __init__(
        self, data: Data, batch_size: int, share: float = 1.0, calibrated: int = 2048, flip: bool = False
    ) -> None:
        ((images, labels),) = data.batches("train", batch_size=10**6)
        train, held_out = hold_out(TensorSplit(images, labels), 1 / 12)
        assert train is not None
        assert held_out is not None
        self.train, self.batch_size, self.calibrated = train, batch_size, calibrated
        self.flip = flip
        self.limit = None if share == 1 else int(share * len(images))
        few = None if share == 1 else 1000
        self.parts = {
            "test": list(data.batches("test", batch_size=EVALUATED, limit=few)),
            "held out": list(held_out.batches(EVALUATED, limit=few)),
        }

    def batches(self) -> Any:
        """Training batches, every pass in another order; the same passes for every caller."""
        batches = self.train.batches(self.batch_size, shuffle=True, limit=self.limit)
        return Augmented(batches, flip=True) if self.flip else batches

    def numbered(self) -> Any:
        """As `batches`, with the images' numbers in place of labels."""
        images = TensorSplit(self.train.inputs, torch.arange(len(self.train)), scaling=self.train.scaling)
        batches = images.batches(self.batch_size, shuffle=True, limit=self.limit)
        return Augmented(batches, flip=True) if self.flip else batches

    def calibration(self) -> Any:
        """Some training images without labels."""
        return inputs(self.train.batches(256, limit=self.calibrated))

    def errors(self, model: nn.Module) -> dict[str, float]:
        """Errors in percent, on the test images and on those held out."""
        model.eval()
        return {part: 100 * (1 - accuracy(model, images, shown=False)) for part, images in self.parts.items()}


class Scores:
    """The loss to a network's scores, which are found once: the mean over an image and its mirror image.

    Both sides are softened by a temperature, as scores on images that the network knows are sure.

    Args:
        model: the network.
        images: a split with the training images.
        temperature: T; the loss is T² times the Kullback-Leibler divergence.
    """

    def __init__(self, model: nn.Module, images: TensorSplit, temperature: float = 4.0) -> None:
        self.temperature = temperature
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            scores = [
                (model(batch) + model(batch.flip(-1))).float() / 2 for batch in inputs(images.batches(256))
            ]
        self.target = (torch.cat(scores) / temperature).log_softmax(-1)

    def __call__(self, scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """The loss of a batch of numbered images."""
        own = (scores / self.temperature).log_softmax(-1)
        lost = F.kl_div(own, self.target[numbers], log_target=True, reduction="batchmean")
        return self.temperature**2 * lost


@cache
def scores(name: str, quick: bool) -> Scores:
    """What a reference network says of its training images."""
    model, data = network(name, quick)
    return Scores(model, data.train)


@cache
def surveyed(name: str, quick: bool) -> Survey:
    """A reference network's survey."""
    model, data = network(name, quick)
    return weft.survey(model, data.calibration(), shown=False)


def trained(make: Callable[[], nn.Module], training: Training, data: Images) -> nn.Module:
    """A reference network; its training is kept under build/ and done once."""
    torch.manual_seed(0)
    folder = WORK / (make.__name__ if data.limit is None else f"{make.__name__}_quick")
    WORK.mkdir(parents=True, exist_ok=True)
    start = make().to(memory_format=torch.channels_last)
    return FineTune(training).run(start, data.batches(), checkpoint=folder).model.eval()


@cache
def network(name: str, quick: bool = False) -> tuple[nn.Module, Images]:
    """A reference network and its data."""
    share = 0.1 if quick else 1.0
    if name == "LeNet-300-100":
        data = Images(mnist(), 256, share)
        return trained(lenet_300_100, Training(40, 0.05, 1e-4, "sgd"), data), data
    if name == "LeNet-5":
        data = Images(mnist(), 128, share)
        return trained(lenet_5, Training(15, 0.02, 1e-4, "sgd", mixed_precision=True), data), data
    model = load_model(f"{HERE / 'models.py'}:resnet20", shared_file("cifar10/resnet20.npz"))
    return model.to(memory_format=torch.channels_last).eval(), Images(cifar10(), 128, share, 512, flip=True)


# ------------------------------------------------------------------------------------------------------------
# The rows

Tasks = Mapping[str, Task | Structure]


@dataclass(frozen=True)
class Row:
    """One compression.

    Attributes:
        part: the table that it belongs to.
        network: which reference.
        tasks: the C steps, or what makes them of the network's survey.
        scheme: the L steps and penalties.
        tuning: how to fine-tune; the epochs follow from the scheme.
        tuned: how many epochs; half as many as L steps where None.
        taught: whether the reference's scores are learned in place of the labels.
        published: the error in percent that the LC library's page gives, where its reference has 2.13.
    """

    part: str
    network: str
    tasks: Tasks | Callable[[Survey], Tasks]
    scheme: LearningCompression
    tuning: Training = Training(learning_rate=1e-3)
    tuned: int | None = None
    taught: bool = False
    published: float | None = None


def scheme(
    first: float, factor: float, steps: int = 20, rate: float = 0.1, mixed_precision: bool = False
) -> LearningCompression:
    """L steps of one epoch of stochastic gradient descent, as the library's examples have (there 20)."""
    training = Training(1, rate, optimiser="sgd", schedule="constant", mixed_precision=mixed_precision)
    return LearningCompression(training, rising(first, factor, steps), 0.97)


def planned(family: str, budget: Budget) -> Callable[[Survey], Tasks]:
    """Sizes chosen once, by the errors weighted with what flows through the layers."""

    def tasks(survey: Survey) -> Tasks:
        plan = weft.allocate(survey, family, budget, shown=False)
        return {name: structure for name, structure in plan.items() if structure != Dense()}

    return tasks


LIBRARY, SMALL, CURVES, RESIDUAL = "LC library", "pruned and quantised", "low rank", "ResNet-20"
# Levels: the quadratic penalty, whose steps all weights feel alike where the optimiser scales them.
LEVELS = LearningCompression(
    Training(1, optimiser="adam", schedule="constant"), rising(1e-4, 1.5, 20), 0.97, multipliers=False
)
BINARY = Quantized(1, codebook="kmeans")
REFERENCE_ERROR = 2.13
# Few steps, in bfloat16: the pull to the structures soon is as strong as the loss's.
TUNING = Training(learning_rate=1e-3, mixed_precision=True)
# A rate that halves from step to step: what the noise of a constant one costs, three steps do not win back.
RESIDUAL_STEPS = replace(scheme(0.05, 2.5, 3, 0.01, True), metric="outputs", learning_rate_decay=0.5)
# Sizes follow from price over penalty, so that both must be of one order from the first step on.
RESIDUAL_CURVE = replace(RESIDUAL_STEPS, penalties=rising(0.15, 1.6, 3))


def lenet_5_row(part: str, tasks: Tasks, scheme: LearningCompression) -> Row:
    """A row of LeNet-5."""
    return Row(part, "LeNet-5", tasks, scheme, TUNING)


def resnet_row(family: str, budget: Budget) -> Row:
    """A row of ResNet-20, taught by itself."""
    return Row(RESIDUAL, "ResNet-20", planned(family, budget), RESIDUAL_STEPS, TUNING, 2, True)


def residual_curve(tasks: Tasks) -> Row:
    """A point of ResNet-20's curve."""
    return Row(CURVES, "ResNet-20", tasks, RESIDUAL_CURVE, TUNING, taught=True)


def sums_row(first: int, second: int) -> Row:
    """LeNet-300-100's two large layers as sums of two ranks each, that of the weight and that of a view."""
    tasks = {
        "1": Added((LowRank(first), Reshaped(LowRank(first), 600))),
        "3": Added((LowRank(second), Reshaped(LowRank(second), 200))),
    }
    return Row(CURVES, "LeNet-300-100", tasks, scheme(1e-3, 1.15))


HALF = Budget(multiply_adds=0.5)
LOW_RANK_STEPS = scheme(3e-3, 1.6, 10, 0.02, True)
ROWS = {
    # https://github.com/UCMerced-ML/LC-model-compression/tree/master/examples/lenet300
    "5 % of all weights": Row(
        LIBRARY, "LeNet-300-100", {"*": Together(Pruned(0.05))}, scheme(2e-4, 1.3), published=2.18
    ),
    "1-bit codebooks": Row(LIBRARY, "LeNet-300-100", {"*": BINARY}, LEVELS, published=2.56),
    "1 % + 1-bit codebooks": Row(
        LIBRARY, "LeNet-300-100", {"*": Added((Together(Pruned(0.01)), BINARY))}, LEVELS, published=2.17
    ),
    "ranks by price": Row(
        LIBRARY,
        "LeNet-300-100",
        {"*": Priced("LowRank", Price(parameters=1e-6))},
        scheme(1e-3, 1.15),
        published=1.90,
    ),
    "2 % of all weights, 4 bits": Row(
        SMALL,
        "LeNet-300-100",
        {"*": Together(Quantized(4, of=Pruned(0.02), codebook="kmeans"))},
        scheme(2e-4, 1.3),
    ),
    **{
        f"ranks by price, {price:g}": Row(
            CURVES, "LeNet-300-100", {"*": Priced("LowRank", Price(parameters=price))}, scheme(1e-3, 1.15)
        )
        for price in (3e-6, 1e-5)
    },
    "low rank, plain + reshaped": sums_row(8, 4),
    "low rank, plain + reshaped, half the ranks": sums_row(4, 2),
    "Tucker": resnet_row("Tucker", HALF),
    "LowRank": resnet_row("LowRank", HALF),
    "CanonicalPolyadic": resnet_row("CanonicalPolyadic", HALF),
    # A kernel that is a sparse product is formed as a whole: its multiply-adds stay, only storage shrinks.
    "SparseProduct, half the parameters": resnet_row("SparseProduct", Budget(parameters=0.5)),
    **{
        f"ResNet-20, ranks by price, {price:g} a multiply-add": residual_curve({
            "*": Priced("LowRank", Price(multiply_adds=price))
        })
        for price in (2e-6, 6e-6, 1.5e-5)
    },
    "ResNet-20, plain + reshaped": residual_curve({
        f"layer{stage}.*": Added((LowRank(own), Reshaped(LowRank(own), 24 * 2**stage)))
        for stage, own in ((1, 4), (2, 8), (3, 16))
    }),
    **{
        f"ranks by price, {price:g} a multiply-add": lenet_5_row(
            CURVES, {"*": Priced("LowRank", Price(multiply_adds=price))}, LOW_RANK_STEPS
        )
        for price in (1e-7, 5e-7)
    },
    "sums of low rank": lenet_5_row(
        CURVES,
        {
            "2": Added((LowRank(6), Reshaped(LowRank(6), 250))),
            "5": Added((LowRank(6), Reshaped(LowRank(6), 1000))),
        },
        LOW_RANK_STEPS,
    ),
    "3 % of all weights": lenet_5_row(
        SMALL, {"*": Together(Pruned(0.03))}, scheme(2e-3, 1.6, 10, 0.02, True)
    ),
    "2-bit codebooks": lenet_5_row(
        SMALL,
        {"*": Quantized(2, codebook="kmeans")},
        replace(
            LEVELS,
            training=replace(LEVELS.training, mixed_precision=True),
            penalties=rising(1e-3, 1.9, 10),
        ),
    ),
}


# Of every table something, by each kind of C step.
QUICK = (
    "5 % of all weights",
    "1-bit codebooks",
    "1 % + 1-bit codebooks",
    "ranks by price",
    "2 % of all weights, 4 bits",
    "ranks by price, 3e-06",
    "low rank, plain + reshaped",
    "sums of low rank",
    "3 % of all weights",
    "Tucker",
)


def settings(row: Row, quick: bool) -> tuple[LearningCompression, int]:
    """The scheme and the epochs of fine-tuning."""
    penalties = row.scheme.penalties
    lc = replace(row.scheme, penalties=penalties[:: len(penalties) // 2]) if quick else row.scheme
    return lc, max(1, len(lc.penalties) // 2) if row.tuned is None or quick else row.tuned


def run(name: str, quick: bool) -> dict[str, Any]:
    """Both ways to the structures of one row."""
    row = ROWS[name]
    model, data = network(row.network, quick)
    survey = surveyed(row.network, quick)
    folder = folders(name, quick)
    lc, tuned = settings(row, quick)
    objective = Objective(loss=scores(row.network, quick)) if row.taught else Objective()
    lc = replace(lc, training=replace(lc.training, objective=objective))
    tuning = replace(row.tuning, objective=objective)

    def batches() -> Any:
        return data.numbered() if row.taught else data.batches()

    def fine_tuned(small: nn.Module, way: str, epochs: int) -> nn.Module:
        return FineTune(replace(tuning, epochs=epochs)).run(small, batches(), checkpoint=folder / way).model

    tasks = row.tasks(survey) if callable(row.tasks) else row.tasks
    small, log = lc.run(model, tasks, batches(), survey=survey, checkpoint=folder / "lc")
    found = {layer: small.get_submodule(layer).matrix.structure for layer in structured_layers(small)}
    direct, _ = weft.compress(model, found, survey, batches=data.calibration())
    steps = len(lc.penalties)
    errors = {
        "reference": data.errors(model),
        "lc": data.errors(small),
        "lc, tuned": data.errors(fine_tuned(small, "tuned", tuned)),
        "direct": data.errors(direct),
        "direct, tuned": data.errors(fine_tuned(direct, "direct", steps + tuned)),
    }
    sample = data.parts["test"][0][0][:1]
    whole, left = network_cost(model, sample), network_cost(small, sample)
    return {
        "network": row.network,
        **errors,
        "published": row.published,
        "epochs": {"lc": steps, "tuned": tuned, "direct, tuned": steps + tuned},
        "distance": [entry["distance"] for entry in log if "distance" in entry][-1],
        "structures": {layer: structure.to_json() for layer, structure in found.items()},
        "rates": {
            "parameters": whole.parameters / left.parameters,
            "bytes": footprint(model).stored / footprint(small).stored,
            "multiply_adds": whole.multiply_adds / left.multiply_adds,
        },
    }


def folders(name: str, quick: bool) -> Path:
    """Where a row's runs keep their state."""
    folder = "".join(letter if letter.isalnum() else "_" for letter in name)
    return WORK / (f"{folder}_quick" if quick else folder)


# ------------------------------------------------------------------------------------------------------------
# Tables


def sheets(records: Records) -> Iterator[Sheet]:
    """The LC library's table, and those of Idelbayev and Carreira-Perpiñán as far as measured here."""
    titles = {
        LIBRARY: f"The LC library's LeNet-300-100 (published: its reference has {REFERENCE_ERROR} %)",
        SMALL: "Pruned and quantised",
        CURVES: "Low rank with ranks by price, and sums of low rank and reshaped low rank",
        RESIDUAL: "ResNet-20 at half the multiply-adds, sparse products at half the parameters",
    }
    for part, title in titles.items():
        rows = records.of(part)
        if part == CURVES:  # the library's row is one point of this curve
            rows = [row for row in records.of(LIBRARY) if row["what"] == "ranks by price"] + rows
            rows.sort(key=lambda row: (row["network"], row["rates"]["parameters"]))
        if rows:
            yield Sheet(title, _HEADINGS, list(map(_cells, rows)), _REMARKS.get(part, ""))


_WAYS = ("reference", "lc", "lc, tuned", "direct", "direct, tuned")
_HEADINGS = ("network", "what", "parameters", "bytes", "multiply-adds", *_WAYS)
_REMARKS = {
    LIBRARY: "Test errors in percent. Our reference is better trained; the library's L steps are 20 epochs.",
    RESIDUAL: "Test errors in percent on 5,000 images: differences of 0.4 are noise. It learns from its own "
    "scores on 14,667 of its training images.",
    CURVES: "Test errors in percent. The papers show their own as plots.",
}


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    rates = [f"1/{rate:.1f}" for rate in row["rates"].values()]
    errors = {way: f"{row[way]['test']:.2f}" for way in _WAYS}
    if row["published"] is not None:
        errors["lc, tuned"] += f" ({row['published']:.2f})"
    return (row["network"], row["what"], *rates, *errors.values())


def main() -> None:
    """Measures what is asked for and not known yet."""
    options = parser(__doc__)
    options.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(map(repr, ROWS))}")
    given = options.parse_args()
    unknown = set(given.rows) - set(ROWS)
    if unknown:
        options.error(f"no rows called {', '.join(sorted(unknown))}")
    wanted = given.rows or list(QUICK if given.quick else ROWS)
    try:
        shared_file("mnist/mnist.npz")
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        sys.exit(0)
    records = Records(NAME, quick=given.quick)
    if given.fresh:
        records.rows = [row for row in records.rows if row["what"] not in wanted]
        for name in wanted:
            shutil.rmtree(folders(name, given.quick), ignore_errors=True)
    for name in wanted:
        folders(name, given.quick).mkdir(parents=True, exist_ok=True)
        records.row(ROWS[name].part, {"what": name}, partial(run, name, given.quick))
    show(sheets(records))


if __name__ == "__main__":
    main()
