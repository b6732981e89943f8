"""The data of the experiments, as data sources: `weft evaluate ... --data experiments/data.py:cifar10`.

Read in place from ../shared/data beside the checkout, or from the folder that WEFT_DATA names.
"""

import os
from dataclasses import replace
from pathlib import Path

from weft.checks import fault
from weft.sources import Data, load_data


def data_folder() -> Path:
    """The folder with the evaluation data.

    Raises:
        FileNotFoundError: it is not there.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("WEFT_DATA") or beside)
    if not folder.is_dir():
        expected = "an existing folder with mnist/, cifar10/, imagenet_features/"
        raise FileNotFoundError(
            fault("evaluation data", expected, f"none at {folder}", "set WEFT_DATA to where it lies")
        )
    return folder


def shared_file(name: str) -> Path:
    """The path of one file of the evaluation data, or of one of its folders.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = data_folder() / name
    if not path.exists():
        got = f"none at {path}"
        raise FileNotFoundError(
            fault(f"evaluation data {name}", "at hand", got, "set WEFT_DATA to where it lies")
        )
    return path


def mnist() -> Data:
    """MNIST, 60,000 and 10,000 images of shape (1, 28, 28), pixel / 255."""
    return load_data(f"mnist:{shared_file('mnist')}")


def cifar10() -> Data:
    """CIFAR-10, 16,000 and 5,000 images, normalised as for the ResNets: with ImageNet's constants."""
    mean, std = "mean=0.485,0.456,0.406", "std=0.229,0.224,0.225"
    return load_data(f"cifar10:{shared_file('cifar10')}?{mean}&{std}")


def imagenet_features() -> Data:
    """The inputs of MobileNetV2's classifier: 1,000 sample images to calibrate on, 1,300 of val to test."""
    path = shared_file("imagenet_features/mobilenet_v2.npz")
    data = load_data(f"npz:{path}?x_train=f_sample&y_train=y_sample&x_test=f_val&y_test=y_val")
    return replace(data, name="imagenet_features")


def imagenet_crops() -> Data:
    """As `imagenet_features`, but 8,000 random crops of the sample images to calibrate and train on."""
    crops = load_data(f"npz:{shared_file('imagenet_features/mobilenet_v2_crops.npz')}?x_train=f&y_train=y")
    return replace(imagenet_features(), name="imagenet_crops", train=crops.train)
