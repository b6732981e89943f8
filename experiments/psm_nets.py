"""PSM-LeNet: a LeNet-5 whose layers are products of sparse matrices, on MNIST, by the PSM-nets protocol.

    python experiments/psm_nets.py             # every row that is not measured yet
    python experiments/psm_nets.py --fresh     # measured again

Giffon, Ayache, Kadri, Artières and Sicre 2021, Table IV: a compression rate of 23.3 without loss. Three
starts: fitted to the reference network, its supports with values drawn anew (PSM-reinit), and supports and
values at random (PSM-random). RMSProp, the learning rate from 1e-3, 1e-4 and 1e-5 after ten steps by 5,000
held-out training images, images shifted and turned; "dense" is the reference network trained on in the same
way. All learn from labels alone, but "taught", which is fitted and learns the reference's softened scores,
by Adam at a given rate for half as long. What is printed are errors on the 10,000 test images. Runs go on
from their checkpoints under build/ where they were interrupted. Skips where the data folder is absent.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data import shared_file
from learning_compression import network
from records import Records, Sheet, parser, show

import weft
from weft.measure import network_cost
from weft.schemes.fine_tune import FineTune
from weft.schemes.from_scratch import FromScratch
from weft.sources.augmentation import Augmented
from weft.structures.base import Structure
from weft.structures.sparse_product import SparseProduct

BUILD = Path(__file__).parents[1] / "build" / "psm_nets"
STARTS = ("fitted", "taught", "dense", "supports", "random")
PUBLISHED_RATE = 23.3


def plan(sparsity: int) -> dict[str, Structure]:
    """Two factors for every layer but the first, whose 500 weights stay.

    The last layer's factor of 10 × 500 cannot have fewer entries than 500 times K: K is smaller there.
    """
    found = {"2": sparsity, "5": sparsity, "7": max(1, sparsity // 2)}
    return {layer: SparseProduct(2, entries, "splitting") for layer, entries in found.items()}


def protocol(epochs: int, optimiser: str = "rmsprop", quick: bool = False) -> FineTune:
    """The paper's training, in bfloat16; the learning rate is chosen by held-out images.

    The trials are longer than an epoch of the reduced form, which takes the rate that they choose mostly.
    """
    rates = () if quick else (1e-3, 1e-4, 1e-5)
    return FineTune.of(
        epochs=epochs,
        optimiser=optimiser,
        learning_rate=1e-3,
        rates=rates,
        trial_steps=10,
        mixed_precision=True,
    )


def train(start: str, sparsity: int, epochs: int, quick: bool) -> dict[str, Any]:
    """One row: the network from its start to its error."""
    dense, data = network("LeNet-5", quick)
    scheme, shift, rotation = protocol(epochs, quick=quick), 2, 10
    options: dict[str, Any] = {
        "validation": data.parts["held out"],
        "checkpoint": BUILD / f"{start}_{sparsity}_{epochs}",
    }
    if start == "taught":
        scheme = FineTune.of(epochs=epochs, optimiser="adam", temperature=4.0, mixed_precision=True)
        options["teacher"], shift, rotation = dense, 1, 0
    batches = Augmented(data.batches(), shift=shift, rotation=rotation)
    BUILD.mkdir(parents=True, exist_ok=True)
    before = None
    if start in {"fitted", "taught", "dense"}:
        small = dense
        if start != "dense":
            found = weft.survey(dense, data.calibration(), shown=False)
            small, _ = weft.compress(dense, plan(sparsity), found)
            before = data.errors(small)["test"]
        small, log = scheme.run(small, batches, **options)
    else:
        small, log = FromScratch(scheme, start).run(dense, plan(sparsity), batches, **options)
    parameters, whole = network_cost(small).parameters, network_cost(dense).parameters
    return {
        "parameters": parameters,
        "rate": whole / parameters,
        "untrained": before,
        "error": data.errors(small)["test"],
        "held_out": data.errors(small)["held out"],
        "reference": data.errors(dense)["test"],
        "training_seconds": log[-1]["seconds"],
    }


def sheets(records: Records) -> Iterator[Sheet]:
    """Table IV's LeNet."""
    rows = [
        (
            row["start"],
            "-" if row["start"] == "dense" else str(row["sparsity"]),
            f"{row['parameters']:,}",
            f"{row['rate']:.1f}",
            "-" if row["untrained"] is None else f"{row['untrained']:.2f}",
            f"{row['error']:.2f}",
            f"{row['reference']:.2f}",
        )
        for row in records.of("PSM-LeNet")
    ]
    yield Sheet(
        f"PSM-LeNet on MNIST (published: rate {PUBLISHED_RATE} without loss)",
        ("start", "K", "parameters", "rate", "error untrained, %", "error, %", "reference"),
        rows,
        "The reference was trained on images as they are; all rows, the dense one too, on moved ones.",
    )


def main() -> None:
    """Measures what is missing and prints the table."""
    options = parser(__doc__)
    options.add_argument("starts", nargs="*", metavar="START", help=f"of {', '.join(STARTS)}; all where none")
    given = options.parse_args()
    try:
        shared_file("mnist/mnist.npz")
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        sys.exit(0)
    records = Records("psm_nets", fresh=given.fresh, quick=given.quick)
    for start in given.starts or STARTS:
        epochs = 1 if given.quick else 4 if start == "taught" else 8
        setting = {"start": start, "sparsity": 7, "epochs": epochs}
        records.row("PSM-LeNet", setting, partial(train, **setting, quick=given.quick))
    show(sheets(records))


if __name__ == "__main__":
    main()
