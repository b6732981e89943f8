"""Learning-compression on LeNet-300-100, LeNet-5 (MNIST) and ResNet-20 (CIFAR-10).

python experiments/learning_compression.py references   # trains the two LeNets, about 20 minutes
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from data import mnist
from models import lenet_5, lenet_300_100
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weft.measure import accuracy
from weft.schemes.training import Training
from weft.sources.splits import TensorSplit, hold_out
from weft.storage import write_beside

HERE = Path(__file__).parent
WORK = HERE.parent / "build" / "learning_compression"
VALIDATION = 1 / 12  # of the training images: 5,000


class Mnist:
    """MNIST: 55,000 images to train on, 5,000 to choose by, 10,000 to report on."""

    def __init__(self) -> None:
        data = mnist()
        ((images, labels),) = data.batches("train", batch_size=60_000)
        train, validation = hold_out(TensorSplit(images, labels), VALIDATION)
        assert train is not None
        assert validation is not None
        self.train, self.validation = train, validation
        self.test = list(data.batches("test", batch_size=1000))

    def batches(self, seed: int = 0, batch_size: int = 256) -> Any:
        """Training batches, every pass in another order."""
        return self.train.batches(batch_size, shuffle=True, seed=seed)

    def error(self, model: nn.Module) -> float:
        """Test error in percent."""
        return 100 * (1 - accuracy(model, self.test, shown=False))

    def validation_error(self, model: nn.Module) -> float:
        """Validation error in percent."""
        return 100 * (1 - accuracy(model, self.validation.batches(1000), shown=False))


REFERENCES = {
    "lenet_300_100": (lenet_300_100, Training(40, 0.05, 1e-4, "sgd")),
    "lenet_5": (lenet_5, Training(20, 0.05, 5e-4, "sgd")),
}


def reference(name: str, data: Mnist) -> nn.Module:
    """A trained reference network; trained once and kept under build/."""
    make, training = REFERENCES[name]
    path = WORK / f"{name}.safetensors"
    torch.manual_seed(0)
    model = make()
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model.eval()
    training.run(model, data.batches())
    WORK.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = model.state_dict()
    write_beside(path, lambda beside: save_file(state, beside))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["references"])
    parser.parse_args()
    try:
        data = Mnist()
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        sys.exit(0)
    for name in REFERENCES:
        model = reference(name, data)
        print(name, f"test error {data.error(model):.2f} %, validation {data.validation_error(model):.2f} %")


if __name__ == "__main__":
    main()
