"""The networks of the experiments, as model sources: `weft survey experiments/models.py:resnet20 ...`."""

from collections import OrderedDict

import torch
from data import shared_file
from torch import Tensor, nn
from torch.nn import functional

from weft.sources.archive import read_arrays


def mnist_network() -> nn.Sequential:
    """784-128-32-10 with ReLU; weights: mnist/mlp_784_128_32_10.npz, whose layers are called 0, 1, 2."""
    return nn.Sequential(
        OrderedDict([
            ("flatten", nn.Flatten()),
            ("0", nn.Linear(784, 128)),
            ("activation0", nn.ReLU()),
            ("1", nn.Linear(128, 32)),
            ("activation1", nn.ReLU()),
            ("2", nn.Linear(32, 10)),
        ])
    )


def lenet_300_100() -> nn.Sequential:
    """LeNet-300-100 (LeCun et al. 1998) for (1, 28, 28) images, with ReLU as in Han et al. 2016."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def lenet_5() -> nn.Sequential:
    """LeNet-5 in the form that the compression literature uses: 20 and 50 feature maps, 500 hidden units.

    430,500 weights and 580 biases, as counted in Han et al. 2016, table 3 (431K).
    """
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - channels) // 2  # new channels of zeros on either side of the old ones

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, outputs, height / stride, width / stride)."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding))
        x = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(x)) + shortcut)


class ResidualNetwork(nn.Module):
    """He et al. 2016, section 4.2: 6n + 2 layers with 16, 32 and 64 channels for (3, 32, 32) images."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(channels: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        first = ResidualBlock(channels, outputs, stride)
        return nn.Sequential(first, *(ResidualBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) -> logits (batch, 10)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20() -> ResidualNetwork:
    """ResNet-20 for CIFAR-10; weights: cifar10/resnet20.npz."""
    return ResidualNetwork(3)


def resnet32() -> ResidualNetwork:
    """ResNet-32 for CIFAR-10; weights: cifar10/resnet32.npz."""
    return ResidualNetwork(5)


def mobilenet_v2_classifier() -> nn.Linear:
    """The trained classifier of a MobileNetV2, 1280 features to 1000 classes.

    Its file keeps the weights under other names beside the features, so that it is read here; no --weights.
    """
    arrays = read_arrays("classifier", shared_file("imagenet_features/mobilenet_v2.npz"), {"W", "b"})
    layer = nn.Linear(1280, 1000)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(arrays["W"]))
        layer.bias.copy_(torch.from_numpy(arrays["b"]))
    return layer
