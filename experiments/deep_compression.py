"""Deep Compression (Han et al. 2016) on the MNIST network: prune, share values by a codebook, code them.

    python experiments/deep_compression.py

For every setting the network 784-128-32-10 is pruned in steps, with fine-tuning on the training set after
each; then the kept weights share the values of a codebook, fine-tuned again; then the file is entropy-coded.
Prints bytes and accuracy after every stage, against the dense network as it is and fine-tuned as long, and
writes experiments/results/deep_compression.json. Skips with a message where the data folder (../shared/data,
or WEFT_DATA) is absent.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data import shared_file
from rich.console import Console
from rich.table import Table
from torch import nn

import weft
from weft.bench import surroundings
from weft.measure import accuracy, footprint
from weft.sources import load_data, load_model
from weft.storage import write_text
from weft.structures import family
from weft.structures.base import Structure
from weft.structures.pruned import Pruned

HERE = Path(__file__).parent
LAYERS = ("0", "1", "2")
BATCH = 100
# The first layer holds 95 % of the weights and bears most: the others keep this much more.
FACTOR = {"0": 1.0, "1": 2.0, "2": 4.0}


@dataclass(frozen=True)
class Setting:
    """One compression.

    Attributes:
        density: of the first layer at the end; the others keep more.
        bits: of the codes.
        steps: how often is pruned, at densities that fall geometrically.
        epochs: of fine-tuning after every step; twice as many after the last.
    """

    density: float
    bits: int
    steps: int = 4
    epochs: int = 3

    def pruned(self, step: int) -> dict[str, Structure]:
        """The plan of one pruning step, the last one at the setting's own density."""
        density = self.density ** ((step + 1) / self.steps)
        return {name: Pruned(min(1.0, density * FACTOR[name]), score="search") for name in LAYERS}

    def coded(self) -> dict[str, Structure]:
        """The plan that codes what the last pruning step has left."""
        quantized: Any = family("Quantized")
        return {
            name: quantized(self.bits, of=Pruned(structure.density), codebook="kmeans")
            for name, structure in self.pruned(self.steps - 1).items()
        }


SETTINGS = [
    Setting(0.2, 5),
    Setting(0.1, 5),
    Setting(0.1, 4),
    Setting(0.05, 4),
    Setting(0.05, 3),
    Setting(0.03, 4),
    Setting(0.03, 3),
]


def dense_again(model: nn.Module, small: nn.Module) -> nn.Module:
    """The dense network with the weights and biases of a compressed one."""
    filled = copy.deepcopy(model)
    with torch.no_grad():
        for name in LAYERS:
            layer, other = filled.get_submodule(name), small.get_submodule(name)
            layer.weight.copy_(other.matrix.to_dense())
            layer.bias.copy_(other.bias)
    return filled


def file_sizes(model: nn.Module) -> dict[str, int]:
    """Bytes of the file, plain and entropy-coded in both ways, and the bound for the tensors alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        sizes = {
            str(coder or "plain"): weft.save(model, path, entropy_coding=coder).stat().st_size
            for coder in (False, "huffman", "range")
        }
    found = footprint(model)
    return {**sizes, "tensors": found.stored, "entropy_bound": found.entropy_bound}


class Run:
    """The network, its data, and the stages."""

    def __init__(self) -> None:
        self.model = load_model(
            f"{HERE / 'models.py'}:mnist_network", shared_file("mnist/mlp_784_128_32_10.npz")
        )
        data = load_data(f"{HERE / 'data.py'}:mnist")
        self.test = list(data.batches("test", batch_size=1000))
        ((images, labels),) = data.batches("train", batch_size=60_000)
        self.images, self.labels = images, labels
        self.calibration = [self.images[:4096]]

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The training set in a new order."""
        order = torch.randperm(len(self.images))
        return [(self.images[part], self.labels[part]) for part in order.split(BATCH)]

    def tuned(self, model: nn.Module, epochs: int, learning_rate: float = 1e-3) -> nn.Module:
        """The network trained further by labels."""
        return weft.fine_tune(
            model, self.batches(), epochs=epochs, learning_rate=learning_rate, label_share=1.0
        ).model

    def compressed(self, model: nn.Module, plan: Mapping[str, Structure]) -> nn.Module:
        """Every layer fitted in the metric of its own inputs."""
        survey = weft.survey(model, self.calibration)
        return weft.compress(model, plan, survey, batches=self.calibration).model

    def measured(self, model: nn.Module) -> dict[str, object]:
        """Accuracy and bytes."""
        return {"accuracy": accuracy(model, self.test), **file_sizes(model)}

    def setting(self, setting: Setting) -> dict[str, object]:
        """All stages of one setting."""
        start = time.perf_counter()
        dense = self.model
        stages = {}
        for step in range(setting.steps):
            small = self.compressed(dense, setting.pruned(step))
            last = step == setting.steps - 1
            if last:
                stages["pruned"] = self.measured(small)
            small = self.tuned(small, setting.epochs * (2 if last else 1))
            dense = dense_again(self.model, small)
        stages["pruned, tuned"] = self.measured(small)
        small = self.compressed(dense, setting.coded())
        stages["codebook"] = self.measured(small)
        small = self.tuned(small, setting.epochs)
        stages["codebook, tuned"] = self.measured(small)
        seconds = time.perf_counter() - start
        return {"density": setting.density, "bits": setting.bits, "stages": stages, "seconds": seconds}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        run = Run()
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        sys.exit(0)
    dense = run.measured(run.model)
    first = SETTINGS[0]
    tuned = run.measured(run.tuned(run.model, first.epochs * (first.steps + 2)))
    rows = [run.setting(setting) for setting in SETTINGS]
    title = f"MNIST 784-128-32-10, dense {dense['accuracy']:.4f} ({tuned['accuracy']:.4f} tuned as long)"
    table = Table(title=title, title_justify="left")
    for heading in ("density", "bits", "stage", "accuracy", "plain", "Huffman", "range", "rate"):
        table.add_column(heading, justify="right")
    for row in rows:
        for stage, found in row["stages"].items():
            sizes = [f"{found[key]:,}" for key in ("plain", "huffman", "range")]
            rate = f"{dense['plain'] / found['range']:.1f}x"
            table.add_row(
                f"{row['density']:g}", str(row["bits"]), stage, f"{found['accuracy']:.4f}", *sizes, rate
            )
    Console().print(table)
    (HERE / "results").mkdir(exist_ok=True)
    record = {
        "experiment": "deep_compression",
        "dense": dense,
        "dense_tuned": tuned,
        "rows": rows,
        "command": "python experiments/deep_compression.py",
        "environment": surroundings(),
        "seconds": time.perf_counter() - start,
        "seed": 0,
    }
    path = write_text(HERE / "results" / "deep_compression.json", json.dumps(record, indent=1) + "\n")
    print(f"wrote {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
