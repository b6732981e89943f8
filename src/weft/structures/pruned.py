"""Pruned: Ŵ has few entries, rows, columns or blocks that are not zero, and those are stored.

What is kept is found with the calibration data's metric and the kept values are solved for in it
(`weft.numerics.pruning`), which loses far less than dropping small entries: on a trained 1000×1280 classifier
(top-1 0.798 dense) a tenth of the entries keeps 0.77, dropping alone 0.71.

The places of kept entries are stored in the fewest whole bits per entry (`weft.numerics.supports`): at a
tenth of the entries 5.2 bits each, where a bitmap takes 10 and a 16-bit column index 16.
"""

import dataclasses
import math
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import checks
from weft.kernels.sparse import SparseChain, apply_factor, sparse_chain_apply
from weft.numerics.factor_target import factor_target, product_of
from weft.numerics.gram import squared_error
from weft.numerics.pruning import Among, Grid, Objective, Pattern, prune, reconstruct
from weft.numerics.supports import decode_support, encode_support, pack_bits, unpack_bits
from weft.structures.base import (
    Candidate,
    CurveWork,
    Geometry,
    Gram,
    Rectangle,
    Shape,
    Structure,
    StructuredMatrix,
    matrix_multiply_adds,
    matrix_shape,
)
from weft.structures.dense import Dense

SCORES = ("magnitude", "input", "search")
# The planner's ladder. Below a hundredth a layer is gone, above a half a bitmap and the values cost as much.
_DENSITIES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
_FACTOR_DENSITIES = (0.2, 0.35, 0.5)
# Sweeps over the factors of another family.
_SWEEPS = 3
# A picture of more blocks than this is drawn as one.
_MOST_BLOCKS = 2000


@dataclass(frozen=True)
class Pruned(Structure):
    """Matrices with a share of their entries, the others zero; a convolution's kernel as its matrix.

    Patterns:
        "unstructured": any entries.
        "rows", "columns": whole rows (a convolution's filters) or columns; a smaller dense product runs.
        "2:4", or any "n:m": n of every m neighbouring entries of a row.
        "4x4", or any "HxW": whole blocks of H rows and W columns.

    Scores, without calibration data all the same:
        "magnitude": the largest entries stay (of blocks, those of largest norm).
        "input": the largest |w|·‖x‖, weighted by how strong the inputs (and outputs) are.
        "search": support and values are looked for together; the best and slowest (4 s for 1000×1280).

    Args:
        density: share of the entries that are kept, above 0 and at most 1.
        of: the family whose factors are pruned, each to this density: Pruned(0.3, of=LowRank(100)) is sparse
            low rank. It must be a product of matrices (`Structure.chain`).
        score: how what is kept is found.
        pattern: what is kept or dropped together.
        reconstruct: whether the kept values are solved for, in the calibration data's metric; else they are
            the weight's own.

    Raises:
        ValueError: the density is no share, or the score or pattern unknown, or the density is not the
            pattern's n / m.

    Examples:
        >>> Pruned(density=0.1).parameter_count((1000, 512))
        51200
    """

    source: ClassVar[str] = (
        "Han et al. 2015; Sun et al. 2024 (input-weighted); Meng et al. 2024 (search); "
        "Swaminathan et al. 2020 (sparse low rank)"
    )

    density: float
    of: Structure = Dense()
    score: str = "magnitude"
    pattern: str = "unstructured"
    reconstruct: bool = True

    def __post_init__(self) -> None:
        checks.share("density", self.density)
        checks.one_of("score", self.score, SCORES)
        pattern = self.pattern_of((1, 1))
        if isinstance(pattern, Among) and not math.isclose(self.density, pattern.kept / pattern.group):
            expected = f"{pattern.kept / pattern.group:g} for the pattern {self.pattern}"
            remedy = f"use density={pattern.kept}/{pattern.group}"
            raise ValueError(checks.fault("density", expected, self.density, remedy))

    # -- sizes

    def pattern_of(self, shape: Shape) -> Pattern:
        """The pattern for a weight, without a check that it divides the shape.

        Args:
            shape: the weight's shape.

        Returns:
            A grid of blocks, or n of m.

        Raises:
            ValueError: the pattern's text is none of the known forms.
        """
        outputs, inputs = matrix_shape(shape)
        if self.pattern in {"unstructured", "rows", "columns"}:
            sizes = {"unstructured": (1, 1), "rows": (1, inputs), "columns": (outputs, 1)}
            return Grid(*sizes[self.pattern])
        found = re.fullmatch(r"(\d+)([:x])(\d+)", self.pattern)
        first, second = (int(found[1]), int(found[3])) if found else (0, 0)
        if not found or not first or not second or (found[2] == ":" and first > second):
            expected = "'unstructured', 'rows', 'columns', 'n:m' with n <= m, or 'HxW'"
            raise ValueError(checks.fault("pattern", expected, repr(self.pattern), "write e.g. '2:4', '4x4'"))
        return Among(first, second) if found[2] == ":" else Grid(first, second)

    def count(self, shape: Shape) -> int:
        """How many blocks of the pattern are kept (entries, rows, columns, blocks); at least one.

        Args:
            shape: the weight's shape.

        Returns:
            The number.
        """
        outputs, inputs = matrix_shape(shape)
        pattern = self.pattern_of(shape)
        if isinstance(pattern, Among):
            return outputs * (inputs // pattern.group) * pattern.kept
        blocks = (outputs // pattern.rows) * (inputs // pattern.columns)
        return max(1, round(self.density * blocks))

    @classmethod
    def candidates(cls, shape: Shape, inner: Iterable[Structure] = ()) -> Iterator[Self]:
        plain = [cls(density, score="search") for density in _DENSITIES]
        nested = [
            cls(density, of, "search")
            for of in inner
            if of != Dense() and of.chain(shape)
            for density in _FACTOR_DENSITIES
        ]
        seen = set()
        for candidate in sorted([*plain, *nested], key=lambda one: one.parameter_count(shape)):
            key = (candidate.of, candidate.parameter_count(shape))
            if key not in seen:
                seen.add(key)
                yield candidate

    def _parts(self, shape: Shape) -> dict[str, tuple["Pruned", Shape]]:
        """The pruned factors of another family by name; empty where the weight itself is pruned."""
        if self.of == Dense():
            return {}
        plain = dataclasses.replace(self, of=Dense())
        return {name: (plain, tuple(part)) for name, part in self.of.chain(shape).items()}

    def parameter_count(self, shape: Shape) -> int:
        parts = self._parts(shape)
        if parts:
            return sum(structure.parameter_count(part) for structure, part in parts.values())
        pattern = self.pattern_of(shape)
        return self.count(shape) * (pattern.rows * pattern.columns if isinstance(pattern, Grid) else 1)

    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int:
        if self.pattern == "rows" and self.of == Dense() and geometry is not None and geometry.groups == 1:
            # It runs as a convolution of fewer filters.
            return self.parameter_count(shape) * geometry.positions(shape[2:])
        return matrix_multiply_adds(self.parameter_count(shape), shape, geometry)

    def share_out(
        self, weights: Sequence[Tensor], input_grams: Sequence[Gram | None] = ()
    ) -> "list[Structure]":
        """The blocks of largest norm among those of all weights; every weight keeps at least one."""
        # In a metric an entry counts w² Ĝ_jj, what it gives out alone.
        grids = [self.pattern_of(tuple(weight.shape)) for weight in weights]
        if self.of != Dense() or not all(isinstance(grid, Grid) for grid in grids):
            return super().share_out(weights, input_grams)
        grams = input_grams or [None] * len(weights)
        energies = []
        for grid, weight, gram in zip(grids, weights, grams, strict=True):
            energy = weight.detach().flatten(1).double().square()
            energy = energy if gram is None else energy * gram.diagonal().to(energy)
            energies.append(cast(Grid, grid).blocks(energy).flatten())
        sizes = [len(energy) for energy in energies]
        count = max(1, round(self.density * sum(sizes)))
        chosen = torch.topk(torch.cat(energies), count, sorted=False).indices
        owners = torch.repeat_interleave(torch.tensor(sizes, device=chosen.device))[chosen]
        counts = torch.bincount(owners, minlength=len(sizes)).clamp_min(1).tolist()
        return [
            dataclasses.replace(self, density=kept / size) for kept, size in zip(counts, sizes, strict=True)
        ]

    def resized(self, factor: float, shape: Shape) -> Structure:
        if isinstance(self.pattern_of(shape), Among):
            return super().resized(factor, shape)
        return dataclasses.replace(self, density=min(1.0, self.density * factor))

    def check(self, shape: Shape) -> None:
        outputs, inputs = matrix_shape(shape)
        if self.of != Dense():
            self.of.check(shape)
            parts = self._parts(shape)
            if not parts:
                expected = "a family whose members are products of matrices"
                remedy = "prune e.g. LowRank, or leave it out"
                raise ValueError(checks.fault("of", expected, str(self.of), remedy))
            for structure, part in parts.values():
                structure.check(part)
            return
        pattern = self.pattern_of(shape)
        height, width = (1, pattern.group) if isinstance(pattern, Among) else (pattern.rows, pattern.columns)
        if outputs % height or inputs % width:
            expected = f"of a size that divides a weight of shape {(outputs, inputs)}"
            remedy = f"choose a block whose height divides {outputs} and whose width divides {inputs}"
            raise ValueError(checks.fault("pattern", expected, repr(self.pattern), remedy))

    # -- members

    def _fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None,
        output_gram: Gram | None,
        start: StructuredMatrix | None,
        generator: torch.Generator | None,
    ) -> "PrunedMatrix | PrunedChain":
        if self.of != Dense():
            return self._fit_chain(weight, input_gram, output_gram, generator)
        starts = [start] if isinstance(start, PrunedMatrix) and start.structure == self else []
        objective = Objective(weight.flatten(1), input_gram, output_gram)
        return self._member(weight.shape, *self._prune(objective, weight.shape, starts))

    def _prune(
        self, objective: Objective, shape: Shape, starts: "Iterable[PrunedMatrix]" = ()
    ) -> tuple[Tensor, Tensor]:
        """The pattern's mask and the values."""
        given = [(start.mask(), start.to_dense().detach().flatten(1)) for start in starts]
        return prune(
            objective,
            self.score,
            self.pattern_of(shape),
            self.count(shape),
            reconstructs=self.reconstruct,
            starts=[(mask, values.to(objective.weight)) for mask, values in given],
        )

    def _member(self, shape: Shape, mask: Tensor, values: Tensor) -> "PrunedMatrix":
        """The member with a mask of the pattern's blocks and values in a matrix."""
        pattern = self.pattern_of(shape)
        if isinstance(pattern, Among):
            groups = mask.reshape(len(mask), -1, pattern.group)
            positions = groups.nonzero()[:, 2]
            support = pack_bits(positions, _bits(pattern.group))
            return _Entries(self, shape, values[mask].reshape(len(mask), -1), support)
        support = encode_support(mask)
        if self.pattern == "columns":
            return _Columns(self, shape, values[:, mask[0]], support)
        if self.pattern == "rows":
            return _Rows(self, shape, values[mask[:, 0]], support)
        if self.pattern == "unstructured":
            return _Entries(self, shape, values[mask], support)
        blocks = values.reshape(mask.shape[0], pattern.rows, mask.shape[1], pattern.columns).transpose(1, 2)
        return _Blocks(self, shape, blocks[mask], support)

    def _fit_chain(
        self,
        weight: Tensor,
        input_gram: Gram | None,
        output_gram: Gram | None,
        generator: torch.Generator | None,
    ) -> "PrunedChain":
        metrics: list[tuple[Gram | None, Gram | None]] = [(None, None)]
        if input_gram is not None or output_gram is not None:
            metrics.append((input_gram, output_gram))
        matrix, fits = weight.flatten(1), []
        for grams in metrics:
            inner = self.of.fit(weight, input_gram=grams[0], output_gram=grams[1], generator=generator)
            factors = self._prune_factors(weight.shape, matrix, inner.stored(), *grams)
            fits.append(PrunedChain(self, weight.shape, factors))

        def error(fit: PrunedChain) -> float:
            return float(squared_error(matrix - fit.to_dense().flatten(1), input_gram, output_gram))

        return min(fits, key=error)

    def _prune_factors(
        self,
        shape: Shape,
        matrix: Tensor,
        stored: Mapping[str, Tensor],
        input_gram: Gram | None,
        output_gram: Gram | None,
    ) -> "dict[str, PrunedMatrix]":
        """Prunes one factor after the other, each in the metric that the others leave it, for some sweeps.

        Returns:
            The pruned factors by name.
        """
        parts = self._parts(shape)
        names = list(parts)
        dense = {name: stored[name].flatten(1).to(matrix) for name in names}
        # Rows with metrics of their own share the factors: their mean metric stands in.
        mean = None if input_gram is None else input_gram.average()
        members: dict[str, PrunedMatrix] = {}
        for sweep in range(_SWEEPS if self.reconstruct else 1):
            for index in reversed(range(len(names))):
                name = names[index]
                before = [dense[other] for other in names[:index]]
                after = [dense[other] for other in names[index + 1 :]]
                target, columns, rows = factor_target(matrix, before, after, mean, output_gram)
                if not self.reconstruct:
                    target = dense[name]
                structure, part = parts[name]
                objective = Objective(target.contiguous(), columns, rows)
                if sweep == 0:
                    mask, values = structure._prune(objective, part)
                else:  # the supports stay, their values follow each other
                    mask, own = members[name].mask(), members[name].to_dense().detach().flatten(1)
                    values = reconstruct(objective, structure.pattern_of(part).spread(mask), own)
                members[name] = structure._member(part, mask, values)
                dense[name] = members[name].to_dense().detach().flatten(1)
        return {name: members[name] for name in names}

    def initialise(
        self, shape: Shape, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> "PrunedMatrix | PrunedChain":
        self.check(shape)
        generator = generator or torch.Generator().manual_seed(0)
        parts = self._parts(shape)
        if parts:
            drawn = {
                name: structure.initialise(part, dtype=dtype, generator=generator)
                for name, (structure, part) in parts.items()
            }
            return PrunedChain(self, shape, cast("dict[str, PrunedMatrix]", drawn))
        outputs, inputs = matrix_shape(shape)
        noise = torch.rand(outputs, inputs, dtype=dtype, generator=generator)
        pattern = self.pattern_of(shape)
        mask = pattern.keep(noise, self.count(shape))
        kept = self.parameter_count(shape) / outputs
        values = torch.randn(outputs, inputs, dtype=dtype, generator=generator) / math.sqrt(kept)
        return self._member(shape, mask, values)

    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> "PrunedMatrix | PrunedChain":
        self.check(shape)
        parts = self._parts(shape)
        if parts:
            expected = [f"of.{part}.{name}" for part in parts for name in ("values", "support")]
            checks.tensor_names(tensors.keys(), expected, str(self))
            members = {}
            for name, (structure, part) in parts.items():
                own = {key: tensors[f"of.{name}.{key}"] for key in ("values", "support")}
                members[name] = structure.from_tensors(part, own)
            return PrunedChain(self, shape, members)
        checks.tensor_names(tensors.keys(), ["values", "support"], str(self))
        values, support = tensors["values"], tensors["support"]
        remedy = "load the file that belongs to this model"
        checks.shape("values", values.shape, self._values_shape(shape), remedy)
        pattern = self.pattern_of(shape)
        if isinstance(pattern, Among):
            size = math.ceil(self.count(shape) * _bits(pattern.group) / 8)
            checks.shape("support", support.shape, (size,), remedy)
            kind = _Entries
        else:
            kinds = {"columns": _Columns, "rows": _Rows, "unstructured": _Entries}
            kind = kinds.get(self.pattern, _Blocks)
        return kind(self, shape, values, support)

    def _values_shape(self, shape: Shape) -> tuple[int, ...]:
        outputs, inputs = matrix_shape(shape)
        pattern, count = self.pattern_of(shape), self.count(shape)
        if isinstance(pattern, Among):
            return outputs, inputs // pattern.group * pattern.kept
        plain = {"unstructured": (count,), "rows": (count, inputs), "columns": (outputs, count)}
        return plain.get(self.pattern, (count, pattern.rows, pattern.columns))

    @property
    def approximated(self) -> Structure | None:
        return None if self.of == Dense() else self.of

    @classmethod
    def curve_work(cls, *, weighted: bool) -> CurveWork:
        return "apart"  # the metric's decomposition, which sizes share, takes little beside the fits

    @classmethod
    def points(
        cls,
        structures: Sequence[Structure],
        weight: Tensor,
        *,
        input_gram: Gram | None = None,
        output_gram: Gram | None = None,
        geometry: Geometry | None = None,
    ) -> list[Candidate]:
        """Every density with one decomposition of the metric."""
        checks.weight(weight)
        shape = tuple(weight.shape)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        matrix = weight.detach().to(dtype).flatten(1)
        objective = Objective(matrix, input_gram, output_gram)
        size = objective.error(torch.zeros_like(matrix))
        curve = []
        for structure in structures:
            if not isinstance(structure, cls) or structure.of != Dense():
                member = structure.fit(weight, input_gram=input_gram, output_gram=output_gram)
                values = member.to_dense().detach().flatten(1).to(dtype)
            else:
                mask, values = structure._prune(objective, shape)
                member = structure._member(shape, mask, values).to(weight.dtype)
            error = math.sqrt(max(objective.error(values), 0.0) / size) if size > 0 else 0.0
            curve.append(Candidate(structure, member.cost(geometry), error))
        return curve


def _bits(group: int) -> int:
    """Bits of a position in a group."""
    return max(1, (group - 1).bit_length())


# ------------------------------------------------------------------------------------------------------------
# Members


class PrunedMatrix(StructuredMatrix):
    """A member of `Pruned` of a dense weight: `values` of what is kept, and the `support` that says where.

    The support is unpacked once into buffers that are not stored.
    """

    support: Tensor

    def __init__(self, structure: Pruned, shape: Shape, values: Tensor, support: Tensor) -> None:
        super().__init__(structure, shape)
        self.values = nn.Parameter(values.contiguous())
        self.register_buffer("support", support.contiguous())
        self._unpack(structure)

    @abstractmethod
    def _unpack(self, structure: Pruned) -> None:
        """Makes the indices that the products need from the support."""

    @abstractmethod
    def mask(self) -> Tensor:
        """The pattern's mask of blocks, as `Grid.keep` and `Among.keep` give it."""

    @abstractmethod
    def apply_transposed(self, y: Tensor) -> Tensor:
        """Applies the transposed matrix.

        Args:
            y: shape (*batch, outputs).

        Returns:
            y Ŵ, shape (*batch, inputs).
        """

    def _keep(self, **indices: Tensor) -> None:
        for name, tensor in indices.items():
            self.register_buffer(f"_{name}", tensor.contiguous(), persistent=False)

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        return cast(Pruned, self.structure).multiply_adds(self.shape, geometry)

    def _picture_of_all(self) -> list[Rectangle]:
        label = f"{100 * self.values.numel() / (self.outputs * self.inputs):.3g} %"
        return [Rectangle(0, 0, self.outputs, self.inputs, "sparse", label)]


def _single(x: Tensor) -> torch.dtype:
    """The precision to add many terms in: half precisions are summed in single precision."""
    return x.dtype if x.dtype in {torch.float32, torch.float64} else torch.float32


class _Entries(PrunedMatrix):
    """Single entries, row after row."""

    _counts: Tensor

    def _unpack(self, structure: Pruned) -> None:
        pattern, count = structure.pattern_of(self.shape), self.values.numel()
        if isinstance(pattern, Among):
            positions = unpack_bits(self.support, _bits(pattern.group))[:count].reshape(-1, pattern.kept)
            ordered = bool((positions.diff(dim=1) > 0).all())
            if not ordered or int(positions.max()) >= pattern.group:
                remedy = "load the file that belongs to this model"
                expected = f"{pattern.kept} increasing positions in every {pattern.group}"
                raise ValueError(checks.fault("support", expected, "others", remedy))
            groups = torch.arange(len(positions), device=positions.device)[:, None] * pattern.group
            places = (groups + positions).flatten()
        else:
            places = decode_support(self.support, self.outputs * self.inputs, count)
        counts = torch.bincount(places // self.inputs, minlength=self.outputs)
        self._longest = int(counts.max())
        self._keep(counts=counts)
        self.entries = SparseChain([(self.outputs, self.inputs)], counts, places % self.inputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        (values,) = self.in_place(("values",))
        chain: Any = self._modules["entries"]  # found like the values, without nn.Module's search
        return sparse_chain_apply(x, values, chain, bias)

    def apply_transposed(self, y: Tensor) -> Tensor:
        support = self.entries.support(0)
        hidden = y.reshape(-1, self.outputs).T.to(_single(y))
        values = self.values.flatten()[support.order].to(hidden.dtype)
        hidden = apply_factor(values, hidden, support.transposed())
        return hidden.T.to(y.dtype).reshape(*y.shape[:-1], self.inputs)

    def _places(self) -> tuple[Tensor, Tensor]:
        """Row and column of every entry."""
        support = self.entries.support(0)
        return support.rows.to(torch.int64), support.columns.to(torch.int64)

    def to_dense(self) -> Tensor:
        rows, columns = self._places()
        flat = self.values.new_zeros(self.outputs * self.inputs)
        return flat.scatter(0, rows * self.inputs + columns, self.values.flatten()).reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        chosen, support = indices.reshape(-1), self.entries.support(0)
        # Rows are padded to the longest: a mask instead of lengths keeps the shapes static.
        offset = torch.arange(self._longest, device=chosen.device)
        place = (support.starts[chosen][:, None] + offset).clamp_max(self.values.numel() - 1).to(torch.int64)
        values = torch.where(offset < self._counts[chosen][:, None], self.values.flatten()[place], 0)
        columns = support.columns[place].to(torch.int64)
        picked = values.new_zeros(chosen.shape[0], self.inputs).scatter_add(1, columns, values)
        return picked.reshape(*indices.shape, self.inputs)

    def mask(self) -> Tensor:
        mask = torch.zeros(self.outputs, self.inputs, dtype=torch.bool, device=self.values.device)
        mask[self._places()] = True
        return mask

    def picture(self) -> list[Rectangle]:
        return self._picture_of_all()


class _Lines(PrunedMatrix):
    """Whole rows or columns: a dense core and where its lines stand."""

    _lines: Tensor
    _places: Tensor

    @property
    @abstractmethod
    def _length(self) -> int:
        """How many lines the whole matrix has."""

    @property
    @abstractmethod
    def _kept(self) -> int:
        """How many of them are kept."""

    def _unpack(self, structure: Pruned) -> None:
        lines = decode_support(self.support, self._length, self._kept)
        # Every dropped line points to the zero that stands behind the core's.
        places = torch.full((self._length,), self._kept, device=lines.device)
        places[lines] = torch.arange(self._kept, device=lines.device)
        self._keep(lines=lines, places=places)

    def _spread(self, core: Tensor, dimension: int = -1) -> Tensor:
        """Puts lines into their places along one axis, zeros between them."""
        zero = core.new_zeros(()).expand_as(core.narrow(dimension, 0, 1))
        return torch.cat([core, zero], dimension).index_select(dimension, self._places)

    def _runs(self) -> list[tuple[int, int]]:
        """(first, length) of every run of neighbouring kept lines."""
        lines = self._lines.tolist()
        firsts = [line for line, before in zip(lines, [-2, *lines], strict=False) if line != before + 1]
        lasts = [line for line, after in zip(lines, [*lines[1:], -2], strict=True) if after != line + 1]
        return [(first, last - first + 1) for first, last in zip(firsts, lasts, strict=True)]


class _Rows(_Lines):
    """`values` (kept rows, inputs)."""

    @property
    def _length(self) -> int:
        return self.outputs

    @property
    def _kept(self) -> int:
        return self.values.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        checks.last_dimension(x, self.inputs)
        return self._spread(F.linear(x, self.values))

    def apply_transposed(self, y: Tensor) -> Tensor:
        return y.index_select(-1, self._lines) @ self.values

    def convolve(self, x: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
        if geometry.groups != 1:  # the filters that are left need not divide into the groups
            return super().convolve(x, geometry, bias)
        kernel = self.values.reshape(-1, *self.shape[1:])
        y = self._spread(geometry.convolve(x, kernel), 1)
        return y if bias is None else y + bias.reshape(-1, *(1,) * (len(self.shape) - 2))

    def to_dense(self) -> Tensor:
        dense = self.values.new_zeros(self.outputs, self.inputs)
        return dense.index_copy(0, self._lines, self.values).reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        places = self._places[indices]
        picked = self.values[places.clamp_max(self._kept - 1)]
        return torch.where((places < self._kept)[..., None], picked, 0)

    def mask(self) -> Tensor:
        return (self._places < self._kept)[:, None]

    def picture(self) -> list[Rectangle]:
        kept = [Rectangle(first, 0, length, self.inputs) for first, length in self._runs()]
        return [Rectangle(0, 0, self.outputs, self.inputs, "zero"), *kept]


class _Columns(_Lines):
    """`values` (outputs, kept columns)."""

    @property
    def _length(self) -> int:
        return self.inputs

    @property
    def _kept(self) -> int:
        return self.values.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        checks.last_dimension(x, self.inputs)
        return F.linear(x.index_select(-1, self._lines), self.values, bias)

    def apply_transposed(self, y: Tensor) -> Tensor:
        return self._spread(y @ self.values)

    def to_dense(self) -> Tensor:
        dense = self.values.new_zeros(self.outputs, self.inputs)
        return dense.index_copy(1, self._lines, self.values).reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        return self._spread(self.values[indices])

    def mask(self) -> Tensor:
        return (self._places < self._kept)[None]

    def picture(self) -> list[Rectangle]:
        kept = [Rectangle(0, first, self.outputs, length) for first, length in self._runs()]
        return [Rectangle(0, 0, self.outputs, self.inputs, "zero"), *kept]


class _Blocks(PrunedMatrix):
    """`values` (blocks, height, width), block row after block row."""

    _block_rows: Tensor
    _block_columns: Tensor
    _starts: Tensor
    _counts: Tensor

    def _unpack(self, structure: Pruned) -> None:
        count, height, width = self.values.shape
        self._grid = (self.outputs // height, self.inputs // width)
        places = decode_support(self.support, math.prod(self._grid), count)
        rows = places // self._grid[1]
        counts = torch.bincount(rows, minlength=self._grid[0])
        self._longest = int(counts.max())
        self._keep(
            block_rows=rows,
            block_columns=places % self._grid[1],
            starts=counts.cumsum(0) - counts,
            counts=counts,
        )

    def forward(self, x: Tensor) -> Tensor:
        checks.last_dimension(x, self.inputs)
        return self._multiply(x, self.values.mT, self._block_columns, self._block_rows, *self._grid)

    def apply_transposed(self, y: Tensor) -> Tensor:
        return self._multiply(y, self.values, self._block_rows, self._block_columns, *reversed(self._grid))

    def _multiply(
        self, x: Tensor, values: Tensor, gathered: Tensor, added: Tensor, size: int, parts: int
    ) -> Tensor:
        """Gathers parts of x by block, multiplies all blocks at once, adds them up by their place."""
        dtype = _single(x)
        given = x.reshape(-1, parts, values.shape[1]).transpose(0, 1).to(dtype)
        products = torch.bmm(given.index_select(0, gathered), values.to(dtype))
        summed = products.new_zeros(size, *products.shape[1:]).index_add(0, added, products)
        return summed.transpose(0, 1).to(x.dtype).reshape(*x.shape[:-1], size * values.shape[2])

    def to_dense(self) -> Tensor:
        _, height, width = self.values.shape
        dense = self.values.new_zeros(*self._grid, height, width)
        dense = dense.index_put((self._block_rows, self._block_columns), self.values)
        return dense.transpose(1, 2).reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        _, height, width = self.values.shape
        chosen = indices.reshape(-1)
        block = chosen // height
        offset = torch.arange(self._longest, device=chosen.device)
        place = (self._starts[block][:, None] + offset).clamp_max(len(self.values) - 1)
        values = self.values[place, (chosen % height)[:, None]]
        values = torch.where((offset < self._counts[block][:, None])[..., None], values, 0)
        picked = values.new_zeros(chosen.shape[0], self._grid[1], width)
        columns = self._block_columns[place][..., None].expand_as(values)
        return picked.scatter_add(1, columns, values).reshape(*indices.shape, self.inputs)

    def mask(self) -> Tensor:
        mask = torch.zeros(self._grid, dtype=torch.bool, device=self.values.device)
        mask[self._block_rows, self._block_columns] = True
        return mask

    def picture(self) -> list[Rectangle]:
        count, height, width = self.values.shape
        if count > _MOST_BLOCKS:
            return self._picture_of_all()
        places = zip(self._block_rows.tolist(), self._block_columns.tolist(), strict=True)
        kept = [Rectangle(row * height, column * width, height, width) for row, column in places]
        return [Rectangle(0, 0, self.outputs, self.inputs, "zero"), *kept]


class PrunedChain(StructuredMatrix):
    """A member of `Pruned` of another family: its factors, pruned, as submodules `of.<factor's name>`."""

    def __init__(self, structure: Pruned, shape: Shape, factors: Mapping[str, PrunedMatrix]) -> None:
        super().__init__(structure, shape)
        self.of = nn.ModuleDict(dict(factors))

    def _factors(self) -> list[PrunedMatrix]:
        return [cast(PrunedMatrix, factor) for factor in self.of.values()]

    def forward(self, x: Tensor) -> Tensor:
        checks.last_dimension(x, self.inputs)
        for factor in reversed(self._factors()):
            x = factor(x)
        return x

    def to_dense(self) -> Tensor:
        return product_of([factor.to_dense().flatten(1) for factor in self._factors()]).reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        first, *others = self._factors()
        picked = first.rows(indices)
        for factor in others:
            picked = factor.apply_transposed(picked)
        return picked

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        return matrix_multiply_adds(
            sum(factor.multiply_adds() for factor in self._factors()), self.shape, geometry
        )

    def picture(self) -> list[Rectangle]:
        return [
            dataclasses.replace(block, factor=index)
            for index, factor in enumerate(self._factors())
            for block in factor.picture()
        ]
