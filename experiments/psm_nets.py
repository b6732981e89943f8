"""PSM-LeNet: a LeNet-5 whose layers are products of sparse matrices, on MNIST, by the PSM-nets protocol.

    python experiments/psm_nets.py             # every row that is not measured yet
    python experiments/psm_nets.py --fresh     # measured again

Giffon, Ayache, Kadri, Artières and Sicre 2021, Table IV: a compression rate of 23.3 without loss. Three
starts: fitted to the reference network (PALM4MSA), its supports with values drawn anew (PSM-reinit), and
supports and values at random (PSM-random). RMSProp, the learning rate from 1e-3, 1e-4 and 1e-5 after ten
steps by 5,000 held-out training images; what is printed are errors on the 10,000 test images. All learn from
labels alone. Runs go on from their checkpoints under build/ where they were interrupted. Skips where the
data folder is absent.
"""

from pathlib import Path
from typing import Any

from data import shared_file
from learning_compression import network
from records import Records, Sheet, parser, show

import weft
from weft.measure import network_cost
from weft.schemes.fine_tune import FineTune
from weft.schemes.from_scratch import FromScratch
from weft.structures.base import Structure
from weft.structures.sparse_product import SparseProduct

BUILD = Path(__file__).parents[1] / "build" / "psm_nets"
STARTS = ("fitted", "supports", "random")
PUBLISHED_RATE = 23.3


def plan(sparsity: int) -> dict[str, Structure]:
    """Two factors for every layer but the first, whose 500 weights stay."""
    few = min(sparsity, 4)
    return {"2": SparseProduct(2, sparsity), "5": SparseProduct(2, sparsity), "7": SparseProduct(2, few)}


def train(start: str, sparsity: int, epochs: int) -> dict[str, Any]:
    """One row: the network from its start to its error."""
    dense, data = network("LeNet-5")
    scheme = FineTune.of(epochs=epochs, optimiser="rmsprop", rates=(1e-3, 1e-4, 1e-5), trial_steps=10)
    options: dict[str, Any] = {
        "validation": data.parts["held out"],
        "checkpoint": BUILD / f"{start}_{sparsity}_{epochs}",
    }
    BUILD.mkdir(parents=True, exist_ok=True)
    if start == "fitted":
        found = weft.survey(dense, data.calibration())
        small, _ = weft.compress(dense, plan(sparsity), found)
        before = data.errors(small)["test"]
        small, log = scheme.run(small, data.batches(), **options)
    else:
        before = None
        small, log = FromScratch(scheme, start).run(dense, plan(sparsity), data.batches(), **options)
    parameters, whole = network_cost(small).parameters, network_cost(dense).parameters
    return {
        "parameters": parameters,
        "rate": whole / parameters,
        "untrained": before,
        "error": data.errors(small)["test"],
        "reference": data.errors(dense)["test"],
        "training_seconds": log[-1]["seconds"],
    }


def main() -> None:
    """Measures what is missing and prints the table."""
    options = parser(__doc__).parse_args()
    try:
        shared_file("mnist/mnist.npz")
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        return
    records = Records("psm_nets", fresh=options.fresh, quick=options.quick)
    for sparsity in (7, 5):
        for start in STARTS:
            setting = {"start": start, "sparsity": sparsity, "epochs": 1 if options.quick else 15}
            records.row(
                "PSM-LeNet",
                setting,
                lambda setting=setting: train(*setting.values()),  # type: ignore[misc]
            )
    rows = [
        (
            row["start"],
            str(row["sparsity"]),
            f"{row['parameters']:,}",
            f"{row['rate']:.1f}",
            "-" if row["untrained"] is None else f"{row['untrained']:.2f}",
            f"{row['error']:.2f}",
            f"{row['error'] - row['reference']:+.2f}",
            f"{row['training_seconds']:.0f}",
        )
        for row in records.of("PSM-LeNet")
    ]
    headings = ("start", "per row", "parameters", "rate", "untrained %", "error %", "over dense", "seconds")
    title = f"PSM-LeNet on MNIST (published: rate {PUBLISHED_RATE} without loss)"
    show([Sheet(title, headings, rows)])


if __name__ == "__main__":
    main()
