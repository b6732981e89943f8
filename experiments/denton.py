"""Denton et al. 2014: fully connected layers of low rank, and convolutions flattened to one-dimensional ones.

    python experiments/denton.py                 # five minutes
    python experiments/denton.py --quick         # convolutions of 96 channels, a LeNet-300-100 less trained

"layers": one layer after the other at two ranks, the compression of its weight and what the network then
loses on the test images, plain as in the paper and weighted by the inputs' Gram. "convolutions": 5×5
convolutions of 96, 128 and 256 channels as 1×1, 5×1, 1×5 and 1×1 ones (section 3.2's biclustering is not
here), of a rank of half and of all channels: time over the dense layer's, one thread, in turns. Writes
experiments/results/denton.json.
"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from data import imagenet_features, mnist, shared_file
from learning_compression import network
from models import mnist_network, mobilenet_v2_classifier
from records import Records, Sheet, parser, show
from torch import nn

import weft
from weft.layers.replace import structured_layer
from weft.measure import accuracy, threads, time_alternating
from weft.progress import track
from weft.sources import load_model
from weft.structures.canonical_polyadic import CanonicalPolyadic
from weft.structures.low_rank import LowRank

CHANNELS, SIZE, WIDTH, BATCH = (96, 128, 256), 27, 5, 16
# Two ranks per layer: about a tenth and a third of the parameters' break-even.
SHARES = (0.1, 0.3)


class Network:
    """A network, its data and its surveys."""

    def __init__(self, model: nn.Module, data: Any) -> None:
        self.model = model.eval()
        self.held_out = list(data.batches("test", batch_size=1000))
        calibration = list(data.inputs("calibration", batch_size=500, limit=4000))
        self.surveys = {"plain": weft.survey(model), "weighted": weft.survey(model, calibration)}
        self.dense = accuracy(model, self.held_out)

    def row(self, layer: str, rank: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for kind, survey in self.surveys.items():
            small, log = weft.compress(self.model, {layer: LowRank(rank)}, survey, shown=False)
            found[f"{kind}_lost"] = 100 * (self.dense - accuracy(small, self.held_out))
            found["compression"] = survey.layers[layer].cost.parameters / log[0]["parameters"]
        return found


def networks(quick: bool) -> dict[str, Network]:
    weights = shared_file("mnist/mlp_784_128_32_10.npz")
    source = f"{__file__.replace('denton', 'models')}:{mnist_network.__name__}"
    return {
        "MNIST 784-128-32-10": Network(load_model(source, weights), mnist()),
        "LeNet-300-100": Network(network("LeNet-300-100", quick)[0], mnist()),
        "MobileNetV2's classifier": Network(mobilenet_v2_classifier(), imagenet_features()),
    }


def convolution_row(channels: int, rank: int) -> dict[str, Any]:
    """Time of a flattened convolution over that of the dense one."""
    dense = nn.Conv2d(channels, channels, WIDTH, padding=WIDTH // 2).eval()
    structure = CanonicalPolyadic(rank)
    flattened = structured_layer(dense, structure.initialise(tuple(dense.weight.shape))).eval()
    x = torch.randn(BATCH, channels, SIZE, SIZE)
    with threads(1), torch.inference_mode():
        times = time_alternating({"dense": partial(dense, x), "flattened": partial(flattened, x)}, least=7)
    return {
        "dense_seconds": times["dense"].median,
        "seconds": times["flattened"].median,
        "speed_up": times["dense"].median / times["flattened"].median,
        "compression": dense.weight.numel() / (structure.parameter_count(tuple(dense.weight.shape)) or 1),
    }


def main() -> None:
    given = parser(__doc__).parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    records = Records("denton", fresh=given.fresh, quick=given.quick)
    try:
        found = networks(given.quick)
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        sys.exit(0)
    for channels in CHANNELS[: 1 if given.quick else None]:
        for rank in (channels // 2, channels):
            key = {"channels": channels, "rank": rank}
            records.row("convolutions", key, partial(convolution_row, channels, rank))
    for name, each in found.items():
        for layer, surveyed in track(each.surveys["plain"].layers.items(), name):
            rows, columns = surveyed.shape
            for share in SHARES:
                rank = max(1, round(share * rows * columns / (rows + columns)))
                key = {"model": name, "layer": layer or "classifier", "shape": [rows, columns], "rank": rank}
                records.row("layers", key, partial(each.row, layer, rank))
    show(sheets(records))


def sheets(records: Records) -> Iterator[Sheet]:
    """The paper's tables."""
    yield Sheet(
        "Fully connected layers of low rank, one at a time",
        ("network", "layer", "shape", "rank", "compression", "points lost, plain", "weighted"),
        [
            (
                row["model"],
                row["layer"],
                "{}×{}".format(*row["shape"]),
                str(row["rank"]),
                f"{row['compression']:.1f}x",
                f"{row['plain_lost']:.2f}",
                f"{row['weighted_lost']:.2f}",
            )
            for row in records.of("layers")
        ],
        "The paper's layers have 4,096 neurons, and more to spare than these; weighted fits are not its own.",
    )
    yield Sheet(
        f"{WIDTH}×{WIDTH} convolutions at {SIZE}², batch {BATCH}, flattened",
        ("channels", "rank", "compression", "dense, ms", "flattened, ms", "speed-up"),
        [
            (
                str(row["channels"]),
                str(row["rank"]),
                f"{row['compression']:.1f}x",
                f"{1e3 * row['dense_seconds']:.1f}",
                f"{1e3 * row['seconds']:.1f}",
                f"{row['speed_up']:.1f}x",
            )
            for row in records.of("convolutions")
        ],
        "Times of random members on one core of this machine; the paper's are of a 2013 CPU and GPU.",
    )


if __name__ == "__main__":
    main()
