"""A convolution with a structured kernel."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from weft import checks
from weft.layers.base import StructuredLayer
from weft.structures.base import Geometry, StructuredMatrix, exchange_channels

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
CONVOLUTION_CLASSES: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def geometry_of(module: Convolution | TransposedConvolution) -> Geometry:
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
    geometry = Geometry(
        tuple(module.stride), padding, tuple(module.dilation), module.groups, module.padding_mode
    )
    if not isinstance(module, TransposedConvolution):
        return geometry
    return replace(geometry, transposed=True, output_padding=tuple(map(int, module.output_padding)))


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
        self.transposed = geometry.transposed
        self.output_padding = geometry.output_padding or (0,) * len(geometry.stride)
        same = all(before == after for before, after in geometry.padding)
        self.padding = tuple(before for before, _ in geometry.padding) if same else "same"
        self._reversed_padding_repeated_twice = list(
            itertools.chain.from_iterable(reversed(geometry.padding))
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        if not self.transposed:
            return self.matrix.shape
        return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)

    def form_weight(self) -> Tensor:
        kernel = self.matrix.to_dense()
        return exchange_channels(kernel, self.groups) if self.transposed else kernel

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's own name, used as a keyword by callers)
        return self._run(input, self.geometry)

    def _run(self, input: Tensor, geometry: Geometry) -> Tensor:  # noqa: A002
        if input.ndim == len(self.matrix.shape) - 1:
            return self._run(input.unsqueeze(0), geometry).squeeze(0)
        if input.ndim != len(self.matrix.shape) or input.shape[1] != self.in_channels:
            expected = (
                f"of shape (batch, {self.in_channels}, *space) with {len(self.kernel_size)} spatial axes"
            )
            remedy = "pass images of the shape that the dense layer took"
            raise ValueError(checks.fault("input", expected, tuple(input.shape), remedy))
        return self.matrix.convolve(input, geometry, self.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        )


class StructuredTransposedConvolution(StructuredConvolution):
    """Stands where an `nn.ConvTranspose1d`, `nn.ConvTranspose2d` or `nn.ConvTranspose3d` stood.

    Its matrix has the kernel as (outputs, channels / groups, *kernel); `weight` shows torch's own layout,
    (channels, outputs / groups, *kernel).
    """

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:  # noqa: A002
        """Applies the layer.

        Args:
            input: shape (batch, channels, *space), the batch axis optional.
            output_size: the spatial size of the result, further axes may stand before it; where None, the
                smallest one plus `output_padding`.

        Returns:
            Shape (batch, outputs, *space).

        Raises:
            ValueError: no output padding below the stride leads to that size.
        """
        if output_size is None:
            return self._run(input, self.geometry)
        space = len(self.kernel_size)
        wanted = tuple(output_size)[-space:]
        smallest = replace(self.geometry, output_padding=()).output_size(
            self.kernel_size, tuple(input.shape[-space:])
        )
        longer = tuple(size - least for size, least in zip(wanted, smallest, strict=True))
        if any(not 0 <= more < stride for more, stride in zip(longer, self.stride, strict=True)):
            largest = tuple(least + stride - 1 for least, stride in zip(smallest, self.stride, strict=True))
            remedy = "pass a size that the dense layer took"
            raise ValueError(checks.fault("output_size", f"between {smallest} and {largest}", wanted, remedy))
        return self._run(input, replace(self.geometry, output_padding=longer))
