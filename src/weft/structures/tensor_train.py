"""Tensor trains: the matrix as a chain of small cores, every one for some of the rows and of the columns.

Applied one core after the other, a train of rank R makes R numbers of every number of its input. Here
neighbouring cores are merged before they are applied, once for as long as they stay as they are, and the
order of the contraction is chosen by its cost.

A convolution's kernel (outputs, channels, *kernel) is a train whose last core is that of the kernel's space
(Garipov et al. 2016, who have it first). The step that knows the space is a convolution with the kernel's
size, of some of the channels, the others being taken for a batch; every other step is a 1×1 convolution.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import checks
from weft.kernels.dispatch import in_eager
from weft.numerics.gram import DiagonalGram, squared_error
from weft.numerics.tensor_train import (
    Extent,
    Modes,
    Schedule,
    alternate,
    balanced_modes,
    bond_limits,
    bonds,
    contract,
    core_shapes,
    merged,
    schedule,
    skewed_modes,
    train_svd,
    truncation_errors,
)
from weft.structures.base import (
    CONVOLUTIONS,
    PIECE,
    Candidate,
    CurveWork,
    Geometry,
    Gram,
    Rectangle,
    Shape,
    Structure,
    StructuredMatrix,
    ladder,
    matrix_multiply_adds,
    matrix_shape,
)

METHODS = ("svd", "randomized")
MODES = {"skewed": skewed_modes, "balanced": balanced_modes}
# Wider inputs are whitened by the diagonal of their Gram.
_WIDEST_WHITENED = 8192
# A chain whose cost is nearer to the dense kernel's is no faster, for that is one larger product.
_WORTHWHILE = 0.8
# A fit in a weighted norm takes about so many multiply-adds at most, one sweep at least.
_WORK = 3e11


@dataclass(frozen=True)
class TensorTrain(Structure):
    """Products W(i, j) = G₁[i₁, j₁] ⋯ G_d[i_d, j_d] with cores (r_{k−1}, m_k, n_k, r_k), all r_k ≤ R.

    Sizes without suitable factors, such as primes, are padded to the next ones that have them. Where a kernel
    has more than one entry per channel, the last core is theirs.

    Modes:
        "skewed": the first half of the cores has n_k = 2 and shares the outputs out, the second has m_k = 2
            and shares the inputs out. The cores are as large as balanced ones, the hidden representation is
            little larger than the input.
        "balanced": outputs and inputs are both shared out evenly (Novikov et al. 2015).

    Args:
        rank: R, the maximal rank, at least 1.
        cores: d, at least 2.
        method: how each bond is cut: "svd" (optimal) or "randomized" (Halko et al. 2011).
        modes: how the sizes are chosen.

    Raises:
        TypeError: a count is no whole number.
        ValueError: a count is too small, or the method or the modes are unknown.

    Examples:
        >>> TensorTrain(rank=50).parameter_count((1024, 1024))
        104448
        >>> TensorTrain(rank=50).core_shapes((1024, 1024))
        [(1, 16, 2, 32), (32, 16, 2, 50), (50, 2, 16, 32), (32, 2, 16, 1)]
    """

    source: ClassVar[str] = "Oseledets 2011; Novikov et al. 2015; Garipov et al. 2016"

    rank: int
    cores: int = 4
    method: str = "svd"
    modes: str = "skewed"

    def __post_init__(self) -> None:
        checks.integer_between("rank", self.rank, 1, None)
        checks.integer_between("cores", self.cores, 2, None)
        checks.one_of("method", self.method, METHODS)
        checks.one_of("modes", self.modes, tuple(MODES))

    # -- sizes

    def core_modes(self, shape: Shape) -> Modes:
        """The modes of a weight's train.

        Args:
            shape: the weight's shape.

        Returns:
            (m_k, n_k) per core; a kernel's last one is that of its space, and a further one where that is a
            single point.
        """
        outputs, _ = matrix_shape(shape)
        taps = math.prod(shape[2:])
        channels = MODES[self.modes](outputs, shape[1], self.cores - (taps > 1))
        return channels if len(shape) == 2 else (*channels, (1, taps))

    def core_shapes(self, shape: Shape) -> list[tuple[int, int, int, int]]:
        """The shapes of the cores.

        Args:
            shape: the weight's shape.

        Returns:
            (r_{k−1}, m_k, n_k, r_k) per core.
        """
        return core_shapes(self.core_modes(shape), self.rank)

    @classmethod
    def candidates(cls, shape: Shape, inner: Iterable[Structure] = ()) -> Iterator[Self]:
        dense = math.prod(shape)
        found = []
        for modes in MODES:  # balanced ones may fit better, skewed ones run faster
            limit = max(bond_limits(cls(1, modes=modes).core_modes(shape)))
            ladders = (cls(rank, modes=modes) for rank in ladder(1, limit, ratio=1.6))
            counted = [(structure.parameter_count(shape), structure) for structure in ladders]
            found += [pair for pair in counted if pair[0] < dense or pair[1].rank == 1]
        yield from (structure for _, structure in sorted(found, key=lambda pair: pair[0]))

    def parameter_count(self, shape: Shape) -> int:
        return sum(math.prod(core) for core in self.core_shapes(shape))

    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int:
        if geometry is not None and not self.runs_as_chain(shape, geometry):
            return matrix_multiply_adds(math.prod(shape), shape, geometry)
        return self.schedule(shape, geometry).multiply_adds(_extent(shape, geometry))

    def schedule(self, shape: Shape, geometry: Geometry | None = None) -> Schedule:
        """The order in which the cores are applied; it does not depend on the size of the images.

        Args:
            shape: the weight's shape.
            geometry: the convolution's, or None.

        Returns:
            The cheapest order.
        """
        modes = self.core_modes(shape)
        extent = Extent()
        if geometry is not None:
            steps = math.prod(geometry.stride)
            before, after = (1, steps) if geometry.transposed else (steps, 1)
            extent = Extent(before, 1, after, math.prod(shape[2:]))
        return schedule(modes, bonds(modes, self.rank), extent)

    def runs_as_chain(self, shape: Shape, geometry: Geometry) -> bool:
        """Whether a convolution runs as a chain of convolutions, or by the dense kernel, formed once.

        Args:
            shape: the weight's shape.
            geometry: the convolution's.

        Returns:
            True where there is one group and the chain costs clearly less than the dense kernel.
        """
        if geometry.groups != 1:
            return False
        return self.schedule(shape, geometry).cost < _WORTHWHILE * math.prod(shape)

    def peak_activation(self, shape: Shape, geometry: Geometry | None = None) -> int:
        """The most numbers that a step of the chain has in memory, input and output included.

        Args:
            shape: the weight's shape.
            geometry: the convolution's, or None.

        Returns:
            Their number per vector, or per image where the geometry has an input size.
        """
        return self.schedule(shape, geometry).peak(_extent(shape, geometry))

    def check(self, shape: Shape) -> None:
        limit = max(bond_limits(self.core_modes(shape)))
        checks.integer_between(
            "rank", self.rank, 1, limit, of=f"a {tuple(shape)} weight in {self.cores} cores"
        )

    # -- members

    def _fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None,
        output_gram: Gram | None,
        start: StructuredMatrix | None,
        generator: torch.Generator | None,
    ) -> "TensorTrainMatrix":
        shape = tuple(weight.shape)
        modes, matrix = self.core_modes(shape), weight.flatten(1)
        frame = _Frame(shape, modes)
        padded = frame.pad(matrix)
        weighted = input_gram is not None or output_gram is not None

        def decomposed(target: Tensor) -> list[Tensor]:
            return train_svd(target, modes, self.rank, method=self.method, generator=generator)

        def error(cores: Sequence[Tensor]) -> float:
            return float(squared_error(matrix - frame.cut(contract(cores)), input_gram, output_gram))

        trains = [decomposed(padded)]
        if weighted:
            roots = frame.roots(input_gram, output_gram, weight)
            coloured = _by_mode(padded, modes, [(rows, columns) for (rows, _), (columns, _) in roots])
            whitened = decomposed(coloured)
            trains.append([
                torch.einsum("amnb,im,jn->aijb", core, rows_back, columns_back)
                for core, ((_, rows_back), (_, columns_back)) in zip(whitened, roots, strict=True)
            ])
        if isinstance(start, TensorTrainMatrix) and start.modes == modes:
            own = [core.detach().to(weight) for core in start.train_cores()]
            if [tuple(core.shape) for core in own] == self.core_shapes(shape):
                trains.append(own)
        cores = trains[0] if len(trains) == 1 else min(trains, key=error)
        if weighted or frame.padded or len(trains) > 1:

            def metric(residual: Tensor) -> Tensor:
                part = frame.cut(residual)
                part = part if input_gram is None else input_gram.matmul(part)
                return frame.pad(part if output_gram is None else output_gram.matmul(part.T).T)

            dense_input = input_gram is not None and not isinstance(input_gram, DiagonalGram)
            once = padded.numel() * (matrix.shape[1] * dense_input + 4 * self.rank)
            sweeps = max(1, min(3, round(_WORK / (once * len(cores) * 6))))
            cores = min((cores, alternate(padded, cores, metric, sweeps=sweeps, iterations=6)), key=error)
        return TensorTrainMatrix(self, shape, *_balanced(cores))

    def initialise(
        self, shape: Shape, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> "TensorTrainMatrix":
        self.check(shape)
        cores = []
        for core in self.core_shapes(shape):
            # Every entry of the product is a sum over the bonds of products of d numbers.
            deviation = 1 / math.sqrt(core[2] * core[3])
            cores.append(deviation * torch.randn(core, dtype=dtype, generator=generator))
        return TensorTrainMatrix(self, shape, *cores)

    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> "TensorTrainMatrix":
        self.check(shape)
        sizes = self.core_shapes(shape)
        names = [f"core{k}" for k in range(len(sizes))]
        checks.tensor_names(tensors.keys(), names, str(self))
        for name, size in zip(names, sizes, strict=True):
            checks.shape(name, tensors[name].shape, size, "load the file that belongs to this model")
        return TensorTrainMatrix(self, shape, *(tensors[name] for name in names))

    @classmethod
    def curve_work(cls, *, weighted: bool) -> CurveWork:
        return "apart" if weighted else "whole"

    @classmethod
    def error_curve(
        cls,
        weight: Tensor,
        *,
        input_gram: Gram | None = None,
        output_gram: Gram | None = None,
        geometry: Geometry | None = None,
        inner: Iterable[Structure] = (),
    ) -> list[Candidate]:
        """Every rank from one TT-SVD, whose truncations leave out orthogonal parts; fits where weighted."""
        checks.weight(weight)
        shape = tuple(weight.shape)
        structures = list(cls.candidates(shape, inner))
        by_modes: dict[Modes, list[TensorTrain]] = {}
        for structure in structures:
            by_modes.setdefault(structure.core_modes(shape), []).append(structure)
        if (
            input_gram is not None
            or output_gram is not None
            or any(_Frame(shape, m).padded for m in by_modes)
        ):
            return super().error_curve(
                weight, input_gram=input_gram, output_gram=output_gram, geometry=geometry, inner=inner
            )
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        matrix = weight.detach().to(dtype).flatten(1)
        size = max(float(matrix.double().square().sum()), 1e-300)
        errors: dict[TensorTrain, float] = {}
        for modes, group in by_modes.items():
            found = truncation_errors(matrix, modes, [structure.rank for structure in group])
            errors |= dict(zip(group, found, strict=True))
        return [
            structure.point(weight, math.sqrt(errors[structure] / size), geometry) for structure in structures
        ]


def _extent(shape: Shape, geometry: Geometry | None) -> Extent:
    if geometry is None:
        return Extent()
    kernel = shape[2:]
    before = 1 if geometry.input_size is None else math.prod(geometry.input_size)
    positions = geometry.positions(kernel), geometry.output_positions(kernel)
    return Extent(before, *positions, math.prod(kernel))


class _Frame:
    """A weight's matrix within the padded one whose sizes are the products of the modes."""

    def __init__(self, shape: Shape, modes: Modes) -> None:
        self.taps = math.prod(shape[2:])
        self.outputs, self.channels = shape[:2]
        self.modes = modes
        self.rows = math.prod(rows for rows, _ in modes)
        self.columns = math.prod(columns for _, columns in modes) // self.taps
        self.padded = self.rows > self.outputs or self.columns > self.channels

    def pad(self, matrix: Tensor) -> Tensor:
        if not self.padded:
            return matrix
        apart = matrix.unflatten(1, (self.channels, self.taps))
        sides = (0, 0, 0, self.columns - self.channels, 0, self.rows - self.outputs)
        return F.pad(apart, sides).flatten(1)

    def cut(self, matrix: Tensor) -> Tensor:
        if not self.padded:
            return matrix
        apart = matrix.unflatten(1, (self.columns, self.taps))
        return apart[: self.outputs, : self.channels].flatten(1)

    def roots(
        self, input_gram: Gram | None, output_gram: Gram | None, like: Tensor
    ) -> list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """Per core the roots, and their inverses, of the metrics' parts on m_k and on n_k."""
        # A metric is taken for the Kronecker product of its partial traces: a train stays a train under it.
        heights = _partial_roots(output_gram, [rows for rows, _ in self.modes], (self.outputs,), like)
        sizes = [columns for _, columns in self.modes]
        inside = (self.channels,) if self.taps == 1 else (self.channels, self.taps)
        return list(zip(heights, _partial_roots(input_gram, sizes, inside, like), strict=True))


def _partial_roots(
    gram: Gram | None, sizes: Sequence[int], inside: Sequence[int], like: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Roots R and R⁻¹ of a metric's partial trace over all modes but one, for every mode."""
    if gram is None:
        return [(torch.eye(size).to(like), torch.eye(size).to(like)) for size in sizes]
    whole = [math.prod(sizes)] if len(inside) == 1 else [math.prod(sizes) // inside[1], inside[1]]
    room = [most - there for there, most in zip(inside, whole, strict=True)]
    sides = [side for extra in reversed(room) for side in (0, extra)]
    plain = gram.size > _WIDEST_WHITENED or isinstance(gram, DiagonalGram)
    if plain:
        metric = F.pad(gram.diagonal().reshape(*inside), sides)
    else:
        metric = F.pad(gram.dense().reshape(*inside, *inside), sides * 2)
    roots = []
    for k, size in enumerate(sizes):
        before, behind = math.prod(sizes[:k]), math.prod(sizes[k + 1 :])
        if plain:
            part = metric.reshape(before, size, behind).sum((0, 2)).diag()
        else:
            apart = metric.reshape(before, size, behind, before, size, behind)
            part = torch.einsum("aibajb->ij", apart)
        # What lies in the padding alone has no metric of its own.
        part = part + 1e-3 * part.diagonal().mean().clamp_min(1e-300) * torch.eye(size).to(part)
        values, vectors = torch.linalg.eigh(part * (size / part.trace()))
        root = values.clamp_min(1e-12).sqrt()
        roots.append(((vectors * root @ vectors.T).to(like), (vectors / root @ vectors.T).to(like)))
    return roots


def _by_mode(matrix: Tensor, modes: Modes, roots: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Multiplies every mode of a matrix by a symmetric matrix of its own."""
    tensor = matrix.reshape(*(rows for rows, _ in modes), *(columns for _, columns in modes))
    for axis, root in enumerate([*(rows for rows, _ in roots), *(columns for _, columns in roots)]):
        if root.shape[0] > 1:
            tensor = (tensor.movedim(axis, -1) @ root).movedim(-1, axis)
        else:
            tensor = tensor * root.reshape(())
    return tensor.reshape(matrix.shape)


def _balanced(cores: Sequence[Tensor]) -> list[Tensor]:
    """Scales all cores to the same mean square, which trains and quantises best."""
    sizes = [core.double().square().mean().sqrt() for core in cores]
    if any(float(size) == 0 for size in sizes):
        return list(cores)
    mean = torch.stack(sizes).log().mean().exp()
    return [core * (mean / size).to(core) for core, size in zip(cores, sizes, strict=True)]


class TensorTrainMatrix(StructuredMatrix):
    """A member of `TensorTrain`: the cores `core0`, `core1`, … of shapes (r_{k−1}, m_k, n_k, r_k)."""

    def __init__(self, structure: TensorTrain, shape: Shape, *cores: Tensor) -> None:
        super().__init__(structure, shape)
        for k, core in enumerate(cores):
            self.register_parameter(f"core{k}", nn.Parameter(core.contiguous()))
        self.modes = structure.core_modes(self.shape)
        self._matrix_plan = structure.schedule(self.shape)
        self.padded_channels = math.prod(columns for _, columns in self._channel_modes)

    @property
    def _family(self) -> TensorTrain:
        return cast(TensorTrain, self.structure)

    def train_cores(self) -> list[Tensor]:
        """The cores, from left to right."""
        return [getattr(self, f"core{k}") for k in range(len(self.modes))]

    def _operators(self, plan: Schedule) -> tuple[Tensor, ...]:
        """The merged cores of every step."""
        name = " ".join(f"{step.first}-{step.last}{step.direction:+}{step.spatial}" for step in plan.steps)
        return self.derived(name, lambda: tuple(merged(self.train_cores(), step) for step in plan.steps))

    def forward(self, x: Tensor) -> Tensor:
        checks.last_dimension(x, self.inputs)
        # Half precisions are summed in single precision.
        dtype = x.dtype if x.dtype in {torch.float32, torch.float64} else torch.float32
        vectors = x.reshape(-1, self.shape[1], self.inputs // self.shape[1]).to(dtype)
        if self.padded_channels > self.shape[1]:
            vectors = F.pad(vectors, (0, 0, 0, self.padded_channels - self.shape[1]))
        plan = self._matrix_plan
        operators = [operator.to(dtype) for operator in self._operators(plan)]

        def run(piece: Tensor) -> Tensor:
            hidden = piece.reshape(piece.shape[0], *(columns for _, columns in self.modes))
            for step, operator in zip(plan.steps, operators, strict=True):
                rows = hidden.permute(step.order).reshape(-1, step.contracted)
                hidden = (rows @ operator.T).reshape(piece.shape[0], *step.kept, *step.made)
            return hidden.permute(plan.order).flatten(1)

        result = _in_pieces(run, vectors, plan.peak(Extent()))
        return result[:, : self.outputs].to(x.dtype).reshape(*x.shape[:-1], self.outputs)

    def convolve(self, x: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
        plan = _chain_of(self._family, self.shape, geometry)
        if plan is None:
            return super().convolve(x, geometry, bias)
        operators, space = self._operators(plan), len(self.shape) - 2
        if self.padded_channels > self.shape[1]:
            x = F.pad(x, (0, 0) * space + (0, self.padded_channels - self.shape[1]))

        def run(piece: Tensor) -> Tensor:
            count = piece.shape[0]
            hidden = piece.reshape(count, *(n for _, n in self._channel_modes), *piece.shape[2:])
            for step, operator in zip(plan.steps, operators, strict=True):
                last = len(step.order)
                hidden = hidden.permute(*step.order, *range(last, last + space))
                images = hidden.reshape(-1, step.contracted, *hidden.shape[last:])
                if step.spatial:
                    images = geometry.convolve(images, operator.unflatten(2, self.shape[2:]), groups=1)
                else:
                    images = CONVOLUTIONS[space](images, operator.reshape(*operator.shape, *(1,) * space))
                hidden = images.reshape(count, *step.kept, *step.made, *images.shape[2:])
            last = len(plan.order)
            return hidden.permute(*plan.order, *range(last, last + space)).flatten(1, last - 1)

        extent = Extent(
            math.prod(x.shape[2:]), 1, math.prod(geometry.output_size(self.shape[2:], x.shape[2:]))
        )
        result = _in_pieces(run, x, plan.peak(extent))[:, : self.outputs]
        return result if bias is None else result + bias.reshape(-1, *(1,) * space)

    @property
    def _channel_modes(self) -> Modes:
        return self.modes[:-1] if len(self.shape) > 2 else self.modes

    def to_dense(self) -> Tensor:
        rows = math.prod([rows for rows, _ in self.modes])  # a list, which compilers trace
        matrix = contract(self.train_cores()).reshape(rows, self.padded_channels, -1)
        return matrix[: self.shape[0], : self.shape[1]].reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        chosen = indices.reshape(-1)
        digits, rest = [], chosen
        for rows, _ in reversed(self.modes):
            digits.append(rest % rows)
            rest = rest // rows
        product = self.train_cores()[0].new_ones(chosen.shape[0], 1, 1)  # (indices, columns so far, bond)
        for digit, core in zip(reversed(digits), self.train_cores(), strict=True):
            slices = core.transpose(0, 1)[digit]  # (indices, bond, n_k, next bond)
            product = torch.einsum("bca,band->bcnd", product, slices).flatten(1, 2)
        result = product.reshape(chosen.shape[0], self.padded_channels, -1)[:, : self.shape[1]]
        return result.reshape(*indices.shape, self.inputs)

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        return self._family.multiply_adds(self.shape, geometry)

    def picture(self) -> list[Rectangle]:
        shapes = self._family.core_shapes(self.shape)
        return [
            Rectangle(0, 0, before * rows, columns * after, "dense", str(after), k)
            for k, (before, rows, columns, after) in enumerate(shapes, start=1)
        ]


@torch.compiler.assume_constant_result
def _chain_of(family: TensorTrain, shape: Shape, geometry: Geometry) -> Schedule | None:
    """The order of a chain of convolutions; None where the dense kernel runs. Compilers do not trace it."""
    return family.schedule(shape, geometry) if family.runs_as_chain(shape, geometry) else None


def _in_pieces(run: Callable[[Tensor], Tensor], x: Tensor, peak: int) -> Tensor:
    """Applies a chain to few samples at a time, so that what lies between its steps stays small."""
    if torch.is_grad_enabled() or not in_eager() or x.shape[0] * peak <= PIECE:
        return run(x)
    return torch.cat([run(piece) for piece in x.split(max(1, PIECE // peak))])
