"""A convolution with a structured kernel."""

import itertools

from torch import Tensor, nn

from weft import checks
from weft.layers.base import StructuredLayer
from weft.structures.base import Geometry, StructuredMatrix

CONVOLUTION_CLASSES: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def geometry_of(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Geometry:
    """The geometry of a dense convolution, its "same" padding resolved.

    Args:
        module: the layer.

    Returns:
        The geometry without an input size.
    """
    if module.padding == "valid":
        padding = tuple((0, 0) for _ in module.kernel_size)
    elif module.padding == "same":  # torch pads the odd one out behind
        totals = [
            spacing * (width - 1) for spacing, width in zip(module.dilation, module.kernel_size, strict=True)
        ]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    else:
        padding = tuple((int(before), int(before)) for before in module.padding)
    return Geometry(tuple(module.stride), padding, tuple(module.dilation), module.groups, module.padding_mode)


class StructuredConvolution(StructuredLayer):
    """Stands where an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` stood.

    (batch, channels, *space) -> (batch, outputs, *space), the batch axis optional.

    Args:
        matrix: the kernel, shape (outputs, channels / groups, *kernel).
        geometry: stride, padding, dilation, groups.
        bias: shape (outputs,), or None.

    Raises:
        ValueError: the family cannot run as this convolution.
    """

    def __init__(self, matrix: StructuredMatrix, geometry: Geometry, bias: Tensor | None = None) -> None:
        super().__init__(matrix, bias)
        reason = matrix.structure.refusal(matrix.shape, geometry)
        if reason is not None:
            expected = "a family that takes this convolution"
            remedy = f"choose another family or leave the layer dense, because {reason}"
            raise ValueError(checks.fault("matrix", expected, str(matrix.structure), remedy))
        self.geometry = geometry
        self.in_channels = matrix.shape[1] * geometry.groups
        self.out_channels = matrix.outputs
        self.kernel_size = matrix.shape[2:]
        self.stride = geometry.stride
        self.dilation = geometry.dilation
        self.groups = geometry.groups
        self.padding_mode = geometry.padding_mode
        same = all(before == after for before, after in geometry.padding)
        self.padding = tuple(before for before, _ in geometry.padding) if same else "same"
        self._reversed_padding_repeated_twice = list(
            itertools.chain.from_iterable(reversed(geometry.padding))
        )

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's own name, used as a keyword by callers)
        if input.ndim == len(self.matrix.shape) - 1:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        if input.ndim != len(self.matrix.shape) or input.shape[1] != self.in_channels:
            expected = (
                f"of shape (batch, {self.in_channels}, *space) with {len(self.kernel_size)} spatial axes"
            )
            remedy = "pass images of the shape that the dense layer took"
            raise ValueError(checks.fault("input", expected, tuple(input.shape), remedy))
        return self.matrix.convolve(input, self.geometry, self.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        )
