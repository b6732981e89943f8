"""Quantised: every entry is one of a few levels, and only its number is stored, in as few bits as it takes.

Which level an entry becomes is chosen for the layer's inputs, not entry by entry (`weft.numerics.gptq`):
errors are handed on to the columns that are still open, then every entry is chosen again, all others given,
and scales or codebooks are solved for in between.

`of=` quantises what another family stores: a product's factors stay packed and run one after the other; of
any other family every floating tensor is packed, and the family's own member runs with the values.
"""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from weft import checks
from weft.kernels.dispatch import in_plain_eager
from weft.kernels.quantized import (
    codebook_apply,
    look_up,
    pack,
    quantize_activations,
    quantized_apply,
    row_bytes,
    unpack,
)
from weft.numerics.factor_target import factor_target, product_of
from weft.numerics.gauss_newton import refine
from weft.numerics.gptq import (
    Codebook,
    Levels,
    Uniform,
    quantise,
    quantise_several,
    uniform_levels,
)
from weft.numerics.gram import row_sizes, row_weights, squared_error
from weft.numerics.kmeans import binary_scale, codebooks, nearest_level, ternary_scale
from weft.numerics.row_sample import sample_rows
from weft.structures.base import (
    BlockDiagonalGram,
    Candidate,
    Cost,
    Geometry,
    Gram,
    Rectangle,
    RowProfile,
    Shape,
    Structure,
    StructuredMatrix,
    matrix_multiply_adds,
    matrix_shape,
)
from weft.structures.dense import Dense

CODEBOOKS = ("uniform", "kmeans", "kmeans_rows", "binary", "sign", "ternary")
ZEROS = ("level", "between", "free")
ROUNDINGS = ("feedback", "nearest")
_FIXED_BITS = {"binary": 1, "sign": 1, "ternary": 2}
_CODES_PER_BYTE = 5  # of three levels: 3⁵ = 243 fit into one
# Neighbouring inputs that share a scale: with fewer the scales are too large a part of the bytes; where there
# are many bits, one more bit for all is the better use of them.
_GROUPS, _MOST_GROUPED_BITS = (128, 64, 32), 5
# Rows that an error curve of a taller matrix is estimated from: others change it by about one per cent.
_MOST_ROWS = 256
# Sweeps over the factors of a product.
_SWEEPS = 2
# How many entries are quantised together where rows do not know each other.
_NUMBERS_AT_A_TIME = 2**20
# From so many bits on the search for a better start gains nothing that can be seen.
_MANY_BITS = 5
# Up to so many bits a codebook fits into registers. A larger one is slower to look up than the dense product:
# measured 2.6 times at 1000×1280 and 8 bits. There the weight is decoded once and kept, and only storage
# shrinks.
_MOST_LOOKED_UP_BITS = 6


@dataclass(frozen=True)
class Quantized(Structure):
    """Matrices whose entries have few levels; a convolution's kernel as its matrix.

    Codebooks:
        "uniform": levels at equal distances, scale · (code − zero), with a scale per row or group.
        "kmeans": 2^bits levels of any values for the whole matrix; "kmeans_rows": for every row its own.
        "binary": −c and c; "sign": −1 and 1; "ternary": −c, 0 and c, five to a byte.

    Args:
        bits: per entry, 1 to 8; 1 for "binary" and "sign", 2 for "ternary".
        of: the family whose stored numbers are quantised; the weight itself where it is `Dense`.
        codebook: the kind of levels.
        group: how many neighbouring inputs share a scale; a divisor of the inputs. All of a row where None.
        activations: "float", or "int8" to round every input vector to 255 levels and multiply whole numbers.
        zero: where uniform levels have their zero: "level", at code 2^(bits−1), so that zero is a level;
            "between", in the middle, as many levels on either side; "free", stored per row and group.
        rounding: "feedback", chosen together for the layer's inputs; "nearest", each entry alone.
        activation_order: whether error feedback starts with the strongest inputs.

    Raises:
        TypeError: a number is no whole number, or `activation_order` no truth value.
        ValueError: a number is out of bounds or a name unknown, or they do not go together.

    Examples:
        >>> structure = Quantized(bits=4)
        >>> member = structure.fit(torch.randn(100, 64))
        >>> member.cost().bytes  # half a byte per entry and a scale per row
        3600
    """

    source: ClassVar[str] = (
        "Frantar et al. 2023, Algorithm 1; Carreira-Perpiñán and Idelbayev 2017 (binary, ternary, k-means); "
        "Han et al. 2016"
    )

    bits: int
    of: Structure = Dense()
    codebook: str = "uniform"
    group: int | None = None
    activations: str = "float"
    zero: str = "level"
    rounding: str = "feedback"
    activation_order: bool = False

    def __post_init__(self) -> None:
        checks.integer_between("bits", self.bits, 1, 8)
        checks.one_of("codebook", self.codebook, CODEBOOKS)
        checks.one_of("activations", self.activations, ("float", "int8"))
        checks.one_of("zero", self.zero, ZEROS)
        checks.one_of("rounding", self.rounding, ROUNDINGS)
        if not isinstance(self.of, Structure):
            got = type(self.of).__name__
            raise TypeError(checks.fault("of", "a structure", got, "pass e.g. of=LowRank(30)"))
        if not isinstance(self.activation_order, bool):
            got = repr(self.activation_order)
            remedy = "pass True to start with the strongest inputs"
            raise TypeError(checks.fault("activation_order", "True or False", got, remedy))
        fixed = _FIXED_BITS.get(self.codebook, self.bits)
        if self.bits != fixed:
            expected = f'{fixed} with the codebook "{self.codebook}"'
            raise ValueError(checks.fault("bits", expected, self.bits, f"use bits={fixed}"))
        if self.zero != "level" and self.codebook != "uniform":
            expected = f'"level" with the codebook "{self.codebook}"'
            raise ValueError(checks.fault("zero", expected, repr(self.zero), "leave it out"))
        if self.group is not None:
            checks.integer_between("group", self.group, 1, None)
        if self._has_table and self.group is not None:
            expected = f'None with the codebook "{self.codebook}"'
            raise ValueError(checks.fault("group", expected, self.group, 'leave it out, or use "uniform"'))
        if self._has_table and self.activations != "float":
            expected = f'"float" with the codebook "{self.codebook}"'
            remedy = 'use codebook="uniform" for products of whole numbers'
            raise ValueError(checks.fault("activations", expected, repr(self.activations), remedy))

    @property
    def _has_table(self) -> bool:
        return self.codebook in {"kmeans", "kmeans_rows"}

    @property
    def level_count(self) -> int:
        """How many levels there are."""
        return 3 if self.codebook == "ternary" else 1 << self.bits

    @property
    def fixed_zero(self) -> float | None:
        """The code, or the middle between two, that stands for zero; None where it is stored."""
        if self.codebook == "uniform" and self.zero == "free":
            return None
        whole = self.codebook == "ternary" or (self.codebook == "uniform" and self.zero == "level")
        return float(self.level_count // 2) if whole else (self.level_count - 1) / 2

    def groups(self, shape: Shape) -> int:
        """How many scales a row has.

        Args:
            shape: the weight's shape.

        Returns:
            The number.
        """
        return 1 if self.group is None else matrix_shape(shape)[1] // self.group

    # -- sizes

    @classmethod
    def candidates(cls, shape: Shape, inner: Iterable[Structure] = ()) -> Iterator[Self]:
        _, inputs = matrix_shape(shape)
        found = [
            cls(1, codebook="binary"),
            cls(2, codebook="ternary"),
            *(
                cls(bits, group=group, zero="between" if bits == 2 else "level")
                for group in (None, *(width for width in _GROUPS if width < inputs and inputs % width == 0))
                for bits in range(2, 9)
                if group is None or bits <= _MOST_GROUPED_BITS
            ),
        ]
        # A row's own codebook pays where it is short beside the row's codes.
        found += [cls(bits, codebook="kmeans_rows") for bits in (2, 3) if 32 << bits <= inputs]
        found += [
            cls(bits, of)
            for of in inner
            if _depth(of) == 1 and of != Dense() and not isinstance(of, cls)
            for bits in (4, 8)
            if bits == 8 or of.chain(shape)
        ]

        def size(one: Self) -> float:
            count = one.parameter_count(shape)
            return math.inf if count is None else count

        yield from sorted(found, key=lambda one: (size(one), one.bits))

    def _parts(self, shape: Shape) -> dict[str, tuple["Quantized", Shape]]:
        """The quantised factors of another family by name; empty where it is no product."""
        if self.of == Dense():
            return {}
        plain = dataclasses.replace(self, of=Dense())
        return {name: (plain, tuple(part)) for name, part in self.of.chain(shape).items()}

    def parameter_count(self, shape: Shape) -> int | None:
        if self.of != Dense():
            parts = self._parts(shape)
            counts = [cast(int, structure.parameter_count(part)) for structure, part in parts.values()]
            return sum(counts) if counts else None
        outputs, inputs = matrix_shape(shape)
        if self._has_table:
            return outputs * inputs + self.level_count * (1 if self.codebook == "kmeans" else outputs)
        scales = outputs * self.groups(shape)
        stored = {"sign": 0}.get(self.codebook, 2 if self.fixed_zero is None else 1)
        return outputs * inputs + stored * scales

    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int | None:
        if self.of == Dense():
            return matrix_multiply_adds(math.prod(matrix_shape(shape)), shape, geometry)
        parts = self._parts(shape)
        if parts:
            return matrix_multiply_adds(
                sum(math.prod(matrix_shape(part)) for _, part in parts.values()), shape, geometry
            )
        return self.of.multiply_adds(shape, geometry)

    def predicted_cost(self, shape: Shape, element_size: int, geometry: Geometry | None = None) -> Cost:
        plain = super().predicted_cost(shape, element_size, geometry)
        size = 0
        for structure, part in [(self, shape)] if self.of == Dense() else self._parts(shape).values():
            outputs, inputs = matrix_shape(part)
            numbers = cast(int, structure.parameter_count(part)) - outputs * inputs
            size += outputs * structure._row_bytes(inputs) + numbers * element_size
        return dataclasses.replace(plain, bytes=size)

    def refusal(self, shape: Shape, geometry: Geometry | None = None) -> str | None:
        return None if self.of == Dense() or self._parts(shape) else self.of.refusal(shape, geometry)

    def share_out(
        self, weights: Sequence[Tensor], input_grams: Sequence[Gram | None] = ()
    ) -> "list[Structure]":
        return [dataclasses.replace(self, of=part) for part in self.of.share_out(weights, input_grams)]

    def resized(self, factor: float, shape: Shape) -> "Quantized":
        return dataclasses.replace(self, of=self.of.resized(factor, shape))

    def check(self, shape: Shape) -> None:
        if self.of != Dense():
            self.of.check(shape)
            parts = self._parts(shape)
            if not parts and self.group is not None:
                expected = f"None for the tensors of {self.of}"
                raise ValueError(checks.fault("group", expected, self.group, "leave it out"))
            for structure, part in parts.values():
                structure.check(part)
            return
        _, inputs = matrix_shape(shape)
        if self.group is not None and (self.group > inputs or inputs % self.group):
            divisors = [size for size in range(1, inputs + 1) if inputs % size == 0]
            near = min(divisors, key=lambda size: abs(size - cast(int, self.group)))
            expected = f"a divisor of {inputs}, the inputs of a {tuple(shape)} weight"
            raise ValueError(checks.fault("group", expected, self.group, f"use e.g. {near}"))

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
        """All sizes in a few passes over the columns, a tall matrix's errors from part of its rows."""
        # Where an output Gram couples rows, what error feedback over them gains is predicted.
        checks.weight(weight)
        grams = {"input_gram": input_gram, "output_gram": output_gram}
        found: dict[Structure, Candidate] = {}
        plain = [
            structure for structure in structures if isinstance(structure, cls) and structure.of == Dense()
        ]
        if plain:
            profile = cls.row_profile(plain, weight, **grams)
            whole = float(squared_error(weight.detach().double().flatten(1), **grams))
            for structure, lost in profile.errors.items():
                error = math.sqrt(float(profile.factors @ lost) / whole) if whole > 0 else 0.0
                found[structure] = structure.point(weight, error, geometry)
        nested = [structure for structure in structures if structure not in found]
        for point in super().points(nested, weight, **grams, geometry=geometry):
            found[point.structure] = point
        return [found[structure] for structure in structures]

    @property
    def approximated(self) -> Structure | None:
        return None if self.of == Dense() else self.of

    @property
    def rows_apart(self) -> bool:
        return self.of == Dense() and self.codebook != "kmeans"

    @classmethod
    def row_profile(
        cls,
        structures: Sequence[Structure],
        weight: Tensor,
        *,
        input_gram: Gram | None = None,
        output_gram: Gram | None = None,
    ) -> RowProfile:
        """From part of the rows of a tall matrix, all sizes in a few passes over the columns."""
        matrix = weight.detach().to(_precision(weight)).flatten(1)
        weights = row_weights(output_gram, len(matrix))
        rows, factors = torch.arange(len(matrix)), torch.ones(len(matrix), dtype=torch.float64)
        if not isinstance(input_gram, BlockDiagonalGram):  # its blocks are of neighbouring rows
            rows, factors = sample_rows(weights * row_sizes(matrix, input_gram), _MOST_ROWS)
        own = [structure for structure in structures if isinstance(structure, cls)]
        errors: dict[Structure, Tensor] = dict(
            zip(own, _row_errors(own, matrix[rows], input_gram), strict=True)
        )
        return RowProfile(rows, weights[rows] * factors, errors)

    # -- members

    def _fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None,
        output_gram: Gram | None,
        start: StructuredMatrix | None,
        generator: torch.Generator | None,
    ) -> StructuredMatrix:
        metrics: list[tuple[Gram | None, Gram | None]] = [(None, None)]
        if input_gram is not None or output_gram is not None:
            metrics.append((input_gram, output_gram))
        fits = []
        for grams in metrics:
            if self.of == Dense():
                fits.append(self._quantise(weight, *grams))
                continue
            inner = self.of.fit(weight, input_gram=grams[0], output_gram=grams[1], generator=generator)
            if self._parts(weight.shape):
                fits.append(self._fit_chain(weight, inner, *grams))
            else:
                fits.append(self._fit_tensors(weight, inner, *grams))
        matrix = weight.flatten(1)

        def error(fit: StructuredMatrix) -> float:
            return float(squared_error(matrix - fit.to_dense().flatten(1), input_gram, output_gram))

        return fits[0] if len(fits) == 1 else min(fits, key=error)

    def _quantise(
        self, weight: Tensor, input_gram: Gram | None, output_gram: Gram | None
    ) -> "QuantizedMatrix":
        """The weight itself, its codes and levels chosen in the metric."""
        matrix = weight.flatten(1)
        apart = input_gram is None and output_gram is None and self.codebook != "kmeans"
        # Rows that do not know each other are taken few at a time: trials take many times a weight's memory.
        rows = max(1, _NUMBERS_AT_A_TIME // matrix.shape[1]) if apart else len(matrix)
        stored, levels = [], []
        for part in matrix.split(rows):
            diagonal = None if input_gram is None else input_gram.diagonal().to(part)
            codes, own = quantise(
                part,
                self._first_levels(part, diagonal),
                input_gram=input_gram,
                output_gram=output_gram,
                feedback=self.rounding == "feedback",
                by_importance=self.activation_order,
                solves=self.codebook != "sign",
            )
            stored.append(self._pack(codes))
            levels.append(own)
        together = levels[0] if len(levels) == 1 else levels[0].concatenate(levels[1:])
        return self._member(weight.shape, torch.cat(stored), together)

    def _first_levels(self, matrix: Tensor, diagonal: Tensor | None) -> list[Levels]:
        """Levels to start from."""
        rows, columns = matrix.shape
        weights = [None] if diagonal is None else [None, diagonal]
        if self.codebook == "kmeans":
            books = [
                codebooks(
                    matrix.reshape(1, -1),
                    self.level_count,
                    None if weight is None else weight.repeat(rows)[None],
                )
                for weight in weights
            ]
            return [Codebook(book) for book in books]
        if self.codebook == "kmeans_rows":
            books = [codebooks(matrix, self.level_count, weight) for weight in weights[-1:]]
            return [Codebook(book, several=True) for book in books]
        groups = self.groups((rows, columns))
        if self.codebook == "uniform":
            zero = self.fixed_zero
            first = [uniform_levels(matrix, self.level_count, groups, zero, weight) for weight in weights]
        else:
            parts = matrix.unflatten(1, (groups, -1))
            first = []
            for weight in weights:
                mass = None if weight is None else weight.reshape(groups, -1)
                if self.codebook == "sign":
                    scales = matrix.new_full((rows, groups), 2.0)
                elif self.codebook == "binary":
                    scales = 2 * binary_scale(parts, mass)
                else:
                    scales = ternary_scale(parts, mass)
                zeros = torch.full_like(scales, cast(float, self.fixed_zero))
                first.append(Uniform(scales, zeros, self.level_count, False, columns))
        if self.bits >= _MANY_BITS or diagonal is None or self.codebook == "sign":
            return list(first)
        # In a metric that couples the columns, other distances may serve a row better than those of its own.
        last = first[-1]
        wider = [dataclasses.replace(last, scales=factor * last.scales) for factor in (0.8, 1.25)]
        return [*first, *wider]

    def _pack(self, codes: Tensor) -> Tensor:
        return _pack_ternary(codes) if self.codebook == "ternary" else pack(codes, self.bits)

    def _member(self, shape: Shape, stored: Tensor, levels: Levels) -> "QuantizedMatrix":
        if isinstance(levels, Codebook):
            return _CodebookMatrix(self, shape, stored, levels.table)
        uniform = cast(Uniform, levels)
        scales = None if self.codebook == "sign" else uniform.scales
        return _UniformMatrix(self, shape, stored, scales, uniform.zeros if uniform.free else None)

    def _fit_chain(
        self, weight: Tensor, inner: StructuredMatrix, input_gram: Gram | None, output_gram: Gram | None
    ) -> "QuantizedChain":
        """Quantises one factor after the other, each in the metric that the others leave it.

        So every factor makes up for what the rounding of the others lost.

        Returns:
            The best of the sweeps.
        """
        matrix, parts = weight.flatten(1), self._parts(weight.shape)
        names, stored = list(parts), inner.stored()
        dense = _unit_columns({name: stored[name].flatten(1).to(matrix) for name in names})
        mean = None if input_gram is None else input_gram.average()  # all rows share the factors
        best: tuple[float, dict[str, StructuredMatrix]] | None = None
        members: dict[str, StructuredMatrix] = {}
        for _ in range(_SWEEPS if self.rounding == "feedback" else 1):
            for index in reversed(range(len(names))):
                name = names[index]
                before = [dense[other] for other in names[:index]]
                after = [dense[other] for other in names[index + 1 :]]
                target, columns, rows = factor_target(matrix, before, after, mean, output_gram)
                structure, part = parts[name]
                if self.rounding == "nearest":
                    target, rows, columns = dense[name], None, None
                member = structure._quantise(target.reshape(part).contiguous(), columns, rows)
                members[name] = member
                dense[name] = member.to_dense().detach().flatten(1)
            product = product_of([dense[name] for name in names])
            error = float(squared_error(matrix - product, input_gram, output_gram))
            if best is None or error < best[0]:
                best = error, dict(members)
        assert best is not None  # noqa: S101  (there is at least one sweep)
        return QuantizedChain(self, weight.shape, {name: best[1][name] for name in names})

    def _fit_tensors(
        self, weight: Tensor, inner: StructuredMatrix, input_gram: Gram | None, output_gram: Gram | None
    ) -> "QuantizedTensors":
        """Quantises every floating tensor by itself, then solves for all scales and codebooks together."""
        plain, parts = dataclasses.replace(self, of=Dense()), {}
        for name, tensor in inner.stored().items():
            matrix = _as_matrix(tensor)
            if matrix is not None and plain._saves(matrix):
                parts[name] = plain._quantise(matrix, None, None)
        member = QuantizedTensors(self, weight.shape, inner, parts)
        names = [name for name, _ in member.named_parameters()]
        if not names or self.rounding == "nearest":
            return member
        call = _Call(member)

        def build(values: tuple[Tensor, ...]) -> Tensor:
            given = {f"member.{name}": value for name, value in zip(names, values, strict=True)}
            return functional_call(call, given, ("to_dense",)).flatten(1)

        found = refine(
            build,
            [parameter.detach() for parameter in member.parameters()],
            weight.flatten(1),
            input_gram=input_gram,
            output_gram=output_gram,
            steps=4,
        )
        for parameter, value in zip(member.parameters(), found, strict=True):
            parameter.copy_(value)
        return member

    def _saves(self, matrix: Tensor) -> bool:
        """Whether a packed matrix takes fewer bytes than the plain one."""
        shape = tuple(matrix.shape)
        numbers = cast(int, self.parameter_count(shape)) - matrix.numel()
        codes = shape[0] * self._row_bytes(shape[1])
        return codes + numbers * matrix.element_size() < matrix.numel() * matrix.element_size()

    def _row_bytes(self, inputs: int) -> int:
        if self.codebook == "ternary":
            return -(-inputs // _CODES_PER_BYTE)
        return row_bytes(inputs, self.bits)

    def initialise(
        self, shape: Shape, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> StructuredMatrix:
        self.check(shape)
        generator = generator or torch.Generator().manual_seed(0)
        parts = self._parts(shape)
        if parts:
            drawn = {}
            for name, (structure, part) in parts.items():
                drawn[name] = structure.initialise(part, dtype=dtype, generator=generator)
            return QuantizedChain(self, shape, drawn)
        if self.of != Dense():
            inner = self.of.initialise(shape, dtype=dtype, generator=generator)
            plain, packed = dataclasses.replace(self, of=Dense()), {}
            with torch.no_grad():
                for name, tensor in inner.stored().items():
                    matrix = _as_matrix(tensor)
                    if matrix is not None and plain._saves(matrix):
                        packed[name] = plain._quantise(matrix, None, None)
            return QuantizedTensors(self, shape, inner, packed)
        outputs, inputs = matrix_shape(shape)
        codes = torch.randint(self.level_count, (outputs, inputs), generator=generator)
        deviation = 1 / math.sqrt(inputs)
        if self._has_table:
            table = torch.linspace(-1, 1, self.level_count, dtype=dtype) * math.sqrt(3) * deviation
            rows = 1 if self.codebook == "kmeans" else outputs
            return self._member(shape, self._pack(codes), Codebook(table.repeat(rows, 1), several=rows > 1))
        zero = self.fixed_zero
        middle = (self.level_count - 1) / 2 if zero is None else zero
        spread = math.sqrt(sum((code - middle) ** 2 for code in range(self.level_count)) / self.level_count)
        size = (outputs, self.groups(shape))
        scales = torch.full(size, deviation / spread, dtype=dtype)
        zeros = torch.full(size, middle, dtype=dtype)
        return self._member(
            shape, self._pack(codes), Uniform(scales, zeros, self.level_count, zero is None, inputs)
        )

    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> StructuredMatrix:
        self.check(shape)
        remedy = "load the file that belongs to this model"
        parts = self._parts(shape)
        if parts:
            expected = [
                f"of.{part}.{name}" for part, (structure, _) in parts.items() for name in structure._names
            ]
            checks.tensor_names(tensors.keys(), expected, str(self))
            members = {}
            for name, (structure, part) in parts.items():
                own = {key: tensors[f"of.{name}.{key}"] for key in structure._names}
                members[name] = structure.from_tensors(part, own)
            return QuantizedChain(self, shape, members)
        if self.of != Dense():
            return self._tensors_from(shape, tensors)
        checks.tensor_names(tensors.keys(), self._names, str(self))
        outputs, inputs = matrix_shape(shape)
        checks.shape("codes", tensors["codes"].shape, (outputs, self._row_bytes(inputs)), remedy)
        if tensors["codes"].dtype != torch.uint8:
            raise TypeError(checks.fault("codes", "of dtype torch.uint8", tensors["codes"].dtype, remedy))
        if self._has_table:
            size = (1 if self.codebook == "kmeans" else outputs, self.level_count)
            checks.shape("codebook", tensors["codebook"].shape, size, remedy)
            return _CodebookMatrix(self, shape, tensors["codes"], tensors["codebook"])
        for name in self._names[1:]:
            checks.shape(name, tensors[name].shape, (outputs, self.groups(shape)), remedy)
        return _UniformMatrix(self, shape, tensors["codes"], tensors.get("scales"), tensors.get("zeros"))

    @property
    def _names(self) -> list[str]:
        """The stored tensors of a quantised dense weight."""
        if self._has_table:
            return ["codes", "codebook"]
        numbers = [] if self.codebook == "sign" else ["scales"]
        return ["codes", *numbers, *(["zeros"] if self.fixed_zero is None else [])]

    def _tensors_from(self, shape: Shape, tensors: Mapping[str, Tensor]) -> "QuantizedTensors":
        """The member whose inner tensors are packed, each under the inner name and `_packed`."""
        plain = dataclasses.replace(self, of=Dense())
        surplus = [name for name in tensors if not name.startswith("of.")]
        if surplus or not tensors:
            remedy = "reload or refit"
            got = ", ".join(sorted(surplus)) or "none"
            raise ValueError(checks.fault(f"tensors of {self}", "named of.…", got, remedy))
        inside = {name.removeprefix("of."): tensor for name, tensor in tensors.items()}
        marks = [name for name in inside if name.endswith(_SIZES)]
        packed: dict[str, QuantizedMatrix] = {}
        for mark in marks:
            name = mark.removesuffix(_SIZES)
            sizes = tuple(inside.pop(mark).tolist())
            prefix = f"{name}{_PACKED}."
            own = {
                key.removeprefix(prefix): inside.pop(key) for key in list(inside) if key.startswith(prefix)
            }
            member = plain.from_tensors(_matrix_sizes(sizes), own)
            packed[name] = cast(QuantizedMatrix, member)
            inside[name] = member.to_dense().detach().reshape(sizes)
        return QuantizedTensors(self, shape, self.of.from_tensors(shape, inside), packed)


def _precision(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _row_errors(structures: Sequence[Quantized], matrix: Tensor, input_gram: Gram | None) -> Iterator[Tensor]:
    """The squared error of every row, of one quantised dense weight after the other, float64.

    Those with as many scales per row are quantised together.

    Yields:
        Shape (rows,), in the order of the structures.
    """
    diagonal = None if input_gram is None else input_gram.diagonal().to(matrix)
    batches: dict[tuple[object, ...], list[Quantized]] = {}
    for structure in structures:
        table = (structure.codebook, structure.bits) if structure._has_table else ()
        options = structure.rounding, structure.activation_order, structure.codebook == "sign"
        key = (*table, *options, structure.groups(tuple(matrix.shape)), structure.fixed_zero is None)
        batches.setdefault(key, []).append(structure)
    found: dict[Quantized, Tensor] = {}
    for batch in batches.values():
        fits = quantise_several(
            matrix,
            [structure._first_levels(matrix, diagonal) for structure in batch],
            input_gram=input_gram,
            feedback=batch[0].rounding == "feedback",
            by_importance=batch[0].activation_order,
            solves=batch[0].codebook != "sign",
        )
        for structure, (codes, levels) in zip(batch, fits, strict=True):
            found[structure] = row_sizes(matrix - levels.decode(codes), input_gram)
    yield from (found[structure] for structure in structures)


_PACKED, _SIZES = "_packed", "_sizes"


def _depth(structure: Structure) -> int:
    """How deep structures are nested, the dense weight not counted."""
    values = (getattr(structure, field.name) for field in dataclasses.fields(structure))
    flat = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
    inner = [_depth(item) for item in flat if isinstance(item, Structure) and item != Dense()]
    return 1 + max(inner, default=0)


def _matrix_sizes(sizes: tuple[int, ...]) -> tuple[int, int]:
    return (sizes[0], math.prod(sizes[1:])) if len(sizes) > 1 else (1, math.prod(sizes))


def _as_matrix(tensor: Tensor) -> Tensor | None:
    """A stored tensor as the matrix that is quantised; None where it holds no real numbers."""
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to(dtype).reshape(_matrix_sizes(tuple(tensor.shape)))


def _unit_columns(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same product with columns of one length in all factors but the last.

    A row has one scale, so that its entries should be of one size; the next factor's rows, each with its own
    scale, take the lengths over.

    Args:
        factors: by name, from left to right.

    Returns:
        The same dictionary.
    """
    names = list(factors)
    for name, after in zip(names, names[1:], strict=False):
        length = factors[name].norm(dim=0)
        length = torch.where(length > torch.finfo(length.dtype).tiny, length, 1.0)
        factors[name] = factors[name] / length
        factors[after] = factors[after] * length[:, None]
    return factors


def _pack_ternary(codes: Tensor) -> Tensor:
    """Codes 0, 1, 2 as the digits of bytes to the base 3, the first the lowest: (rows, ⌈columns / 5⌉)."""
    padded = F.pad(codes, (0, -codes.shape[1] % _CODES_PER_BYTE))
    digits = 3 ** torch.arange(_CODES_PER_BYTE, device=codes.device)
    return (padded.unflatten(1, (-1, _CODES_PER_BYTE)) * digits).sum(2).to(torch.uint8)


def _unpack_ternary(packed: Tensor, columns: int) -> Tensor:
    """Undoes `_pack_ternary`: int64, shape (rows, columns)."""
    digits = 3 ** torch.arange(_CODES_PER_BYTE, device=packed.device)
    return (packed.to(torch.int64)[..., None] // digits % 3).flatten(1)[:, :columns]


# ------------------------------------------------------------------------------------------------------------
# Members: a matrix


class QuantizedMatrix(StructuredMatrix):
    """A quantised dense weight: `codes` as bytes, row by row, and the numbers that they stand for."""

    codes: Tensor
    _packed: Tensor

    def __init__(self, structure: Quantized, shape: Shape, codes: Tensor) -> None:
        super().__init__(structure, shape)
        self.kind = structure
        self.register_buffer("codes", codes.contiguous())
        if structure.codebook == "ternary":  # the kernel reads two bits per code
            unpacked = _unpack_ternary(self.codes, self.inputs)
            self.register_buffer("_packed", pack(unpacked, structure.bits), persistent=False)
        # What the kernel reads, by name.
        self._read = ("_packed" if structure.codebook == "ternary" else "codes", "scales", "zeros")

    def _bits(self) -> Tensor:
        """The codes as the kernel reads them."""
        return getattr(self, self._read[0])

    @abstractmethod
    def levels(self, chosen: Tensor | None = None) -> Levels:
        """The levels, of single or double precision; of some rows where they are given."""

    @abstractmethod
    def numbers(self) -> dict[str, Tensor]:
        """The stored real numbers by name: scales and zeros, or a codebook."""

    def integers(self, chosen: Tensor | None = None) -> Tensor:
        """The codes one by one.

        Args:
            chosen: rows, shape (n,); all where None.

        Returns:
            int64, shape (rows, inputs).
        """
        bits = self._bits()
        return unpack(bits if chosen is None else bits[chosen], self.kind.bits, self.inputs).long()

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def to_dense(self) -> Tensor:
        return self.levels().decode(self.integers()).to(self._dtype).reshape(self.shape)

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.numbers().values())).dtype

    def rows(self, indices: Tensor) -> Tensor:
        chosen = indices.reshape(-1)
        picked = self.levels(chosen).decode(self.integers(chosen)).to(self._dtype)
        return picked.reshape(*indices.shape, self.inputs)

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        return cast(int, self.kind.multiply_adds(self.shape, geometry))

    def parameter_count(self) -> int:
        return cast(int, self.kind.parameter_count(self.shape))

    def relax(self) -> "RelaxedMatrix":
        numbers = {name: tensor.detach().clone() for name, tensor in self.numbers().items()}
        return RelaxedMatrix(self.kind, self.shape, self.to_dense().detach().clone(), numbers)

    def picture(self) -> list[Rectangle]:
        label = f"{self.kind.level_count} levels"
        return [Rectangle(0, 0, self.outputs, self.inputs, "coded", label)]


def _wide(tensor: Tensor) -> Tensor:
    """Half precision as float32."""
    return tensor if tensor.dtype in {torch.float32, torch.float64} else tensor.float()


class _UniformMatrix(QuantizedMatrix):
    """Stores `scales` (outputs, groups) and, where they are free, `zeros` (outputs, groups)."""

    def __init__(
        self,
        structure: Quantized,
        shape: Shape,
        codes: Tensor,
        scales: Tensor | None = None,
        zeros: Tensor | None = None,
    ) -> None:
        super().__init__(structure, shape, codes)
        size = (self.outputs, structure.groups(shape))
        zero = structure.fixed_zero
        if scales is None:
            self.register_buffer("scales", torch.full(size, 2.0), persistent=False)
        else:
            self.scales = nn.Parameter(scales.contiguous())
        # What never changes is not stored; the kernel knows the usual zero by itself.
        self.zeros: Tensor | None
        if zero is None:
            self.zeros = nn.Parameter(cast(Tensor, zeros).contiguous())
        elif zero == 1 << (structure.bits - 1):
            self.zeros = None
        else:
            fixed = torch.full(size, zero, dtype=self.scales.dtype, device=codes.device)
            self.register_buffer("zeros", fixed, persistent=False)
        group, int8 = structure.group or self.inputs, structure.activations == "int8"
        sizes = (structure.bits, group, self.inputs, int8)
        self.native_call = ("quantized_apply", *self._read, "bias", *sizes, "threads")

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        kind, inputs = self.kind, self.inputs
        codes, scales, zeros = self.in_place(self._read)
        activations: Any = kind.activations
        group = kind.group or inputs
        return quantized_apply(x, codes, scales, zeros, kind.bits, group, inputs, bias, activations)

    def numbers(self) -> dict[str, Tensor]:
        free = {"zeros": cast(Tensor, self.zeros)} if self.kind.fixed_zero is None else {}
        return {"scales": self.scales, **free}

    def levels(self, chosen: Tensor | None = None) -> Uniform:
        numbers = {name: _wide(tensor) for name, tensor in self.numbers().items()}
        levels = _uniform(self.kind, self.inputs, numbers)
        return levels if chosen is None else levels.rows(chosen)


def _uniform(structure: Quantized, inputs: int, numbers: Mapping[str, Tensor]) -> Uniform:
    scales, zero = numbers["scales"], structure.fixed_zero
    zeros = numbers["zeros"] if zero is None else torch.full_like(scales, zero)
    return Uniform(scales, zeros, structure.level_count, zero is None, inputs)


class _CodebookMatrix(QuantizedMatrix):
    """Stores a `codebook` (1, levels), or (outputs, levels) where every row has its own."""

    def __init__(self, structure: Quantized, shape: Shape, codes: Tensor, codebook: Tensor) -> None:
        super().__init__(structure, shape, codes)
        self.codebook = nn.Parameter(codebook.contiguous())
        if structure.bits <= _MOST_LOOKED_UP_BITS:
            sizes = (structure.bits, self.inputs)
            self.native_call = ("codebook_apply", "codes", "codebook", "bias", *sizes, "threads")

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.kind.bits > _MOST_LOOKED_UP_BITS and x.dtype in {torch.float32, torch.float64}:
            checks.last_dimension(x, self.inputs)
            return F.linear(x, self.derived("weight", self._decode).to(x.dtype), bias)
        codes, codebook = self.in_place(("codes", "codebook"))
        return codebook_apply(x, codes, codebook, self.kind.bits, self.inputs, bias)

    def _decode(self) -> Tensor:
        return look_up(self.codes, _wide(self.codebook), self.kind.bits, self.inputs)

    def numbers(self) -> dict[str, Tensor]:
        return {"codebook": self.codebook}

    def levels(self, chosen: Tensor | None = None) -> Codebook:
        levels = Codebook(_wide(self.codebook), several=self.kind.codebook == "kmeans_rows")
        return levels if chosen is None else levels.rows(chosen)


class RelaxedMatrix(StructuredMatrix):
    """A quantised weight in training: a real `latent` for every entry, rounded in the forward pass.

    The gradient passes the rounding as if it were not there (straight-through); scales, zeros and codebooks
    have their own gradients (Esser et al. 2020).
    """

    def __init__(
        self, structure: Quantized, shape: Shape, latent: Tensor, numbers: Mapping[str, Tensor]
    ) -> None:
        super().__init__(structure, shape)
        self.kind = structure
        self.latent = nn.Parameter(latent.flatten(1))
        self.numbers = nn.ParameterDict(dict(numbers))
        if structure.codebook == "sign":
            self.numbers.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        checks.last_dimension(x, self.inputs)
        if self.kind.activations == "int8":
            whole, width = quantize_activations(x.detach())
            x = x + (whole * width - x).detach()
        return F.linear(x, self.to_dense().flatten(1), bias)

    def to_dense(self) -> Tensor:
        numbers = {name: _wide(tensor) for name, tensor in self.numbers.items()}
        latent = _wide(self.latent)
        if "codebook" in numbers:
            book = numbers["codebook"].sort(1).values
            picked = book.expand(self.outputs, -1).gather(1, nearest_level(latent.detach(), book.detach()))
            inside = (latent >= book[:, :1]) & (latent <= book[:, -1:])
            dense = picked + torch.where(inside, latent - latent.detach(), 0)
        else:
            levels = _uniform(self.kind, self.inputs, numbers)
            scales, zeros = levels.spread(levels.scales), levels.spread(levels.zeros)
            place = (latent / torch.where(scales == 0, 1.0, scales) + zeros).clamp(
                0, self.kind.level_count - 1
            )
            dense = scales * (place + (place.round() - place).detach() - zeros)
        return dense.to(self.latent.dtype).reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        return self.to_dense().flatten(1)[indices]

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        return cast(int, self.kind.multiply_adds(self.shape, geometry))

    def harden(self) -> QuantizedMatrix:
        numbers = {name: _wide(tensor.detach()) for name, tensor in self.numbers.items()}
        levels: Levels
        if "codebook" in numbers:
            table = numbers["codebook"].sort(1).values
            levels = Codebook(table, several=self.kind.codebook == "kmeans_rows")
        else:
            levels = _uniform(self.kind, self.inputs, numbers)
        codes = levels.encode(_wide(self.latent.detach()))
        hard = self.kind._member(self.shape, self.kind._pack(codes), levels).to(self.latent.dtype)
        return hard.train(self.training)


# ------------------------------------------------------------------------------------------------------------
# Members: a product


class _Chain(StructuredMatrix):
    """Factors applied from right to left, none of them formed."""

    def __init__(self, structure: Quantized, shape: Shape, factors: Mapping[str, StructuredMatrix]) -> None:
        super().__init__(structure, shape)
        self.kind = structure
        self.of = nn.ModuleDict(dict(factors))

    def _factors(self) -> list[StructuredMatrix]:
        return [cast(StructuredMatrix, factor) for factor in self.of.values()]

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        checks.last_dimension(x, self.inputs)
        first, *others = self._factors()
        for factor in reversed(others):
            x = factor(x)
        return first.affine(x, bias)

    def to_dense(self) -> Tensor:
        factors = [factor.to_dense().flatten(1) for factor in self._factors()]
        return product_of([_wide(factor) for factor in factors]).to(factors[0].dtype).reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        first, *others = self._factors()
        picked = first.rows(indices)
        for factor in others:
            picked = picked @ factor.to_dense().flatten(1)
        return picked

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        return cast(int, self.kind.multiply_adds(self.shape, geometry))

    def parameter_count(self) -> int:
        return sum(factor.parameter_count() for factor in self._factors())

    def picture(self) -> list[Rectangle]:
        return [
            dataclasses.replace(block, factor=index)
            for index, factor in enumerate(self._factors())
            for block in factor.picture()
        ]


class QuantizedChain(_Chain):
    """A member of `Quantized` of a product: its packed factors, by the names they have there."""

    def relax(self) -> "RelaxedChain":
        relaxed = {name: cast(StructuredMatrix, part).relax() for name, part in self.of.items()}
        return RelaxedChain(self.kind, self.shape, relaxed)


class RelaxedChain(_Chain):
    """A product of quantised factors in training."""

    def harden(self) -> QuantizedChain:
        hard = {name: cast(StructuredMatrix, part).harden() for name, part in self.of.items()}
        return QuantizedChain(self.kind, self.shape, hard).train(self.training)


# ------------------------------------------------------------------------------------------------------------
# Members: any other family


class _Tensors(StructuredMatrix):
    """Another family's member whose floating tensors are made of packed ones.

    The inner member `of` holds, in place of a parameter `values`, a buffer of that name that is not stored,
    the packed matrix `values_packed` and the shape `values_sizes` that the values have.
    """

    def __init__(
        self,
        structure: Quantized,
        shape: Shape,
        inner: StructuredMatrix,
        parts: Mapping[str, StructuredMatrix],
    ) -> None:
        super().__init__(structure, shape)
        self.kind = structure
        self.of = inner
        self.names = list(parts)
        self._current: object = None
        self._call = (_Call(inner),)  # in a tuple, lest it be a submodule with the same tensors again
        for name, part in parts.items():
            owner, leaf = self._place(name)
            tensor = getattr(owner, leaf).detach()
            delattr(owner, leaf)
            owner.register_buffer(leaf, tensor, persistent=False)
            owner.register_buffer(leaf + _SIZES, torch.tensor(tensor.shape, dtype=torch.int32))
            owner.add_module(leaf + _PACKED, part)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.of.get_submodule(path), leaf

    def parts(self) -> dict[str, StructuredMatrix]:
        """The packed tensors by the inner member's names."""
        found = {}
        for name in self.names:
            owner, leaf = self._place(name)
            found[name] = cast(StructuredMatrix, owner.get_submodule(leaf + _PACKED))
        return found

    def values(self) -> tuple[Tensor, ...]:
        """The inner member's tensors, differentiable in what is stored."""
        found = []
        for name, part in self.parts().items():
            owner, leaf = self._place(name)
            found.append(part.to_dense().reshape(getattr(owner, leaf).shape))
        return tuple(found)

    def _run(self, run: str, *arguments: object) -> Tensor:
        """Runs a method of the inner member with the values that belong to the packed tensors now."""
        values = self.derived("values", self.values)
        if any(value.requires_grad for value in values) or not in_plain_eager():
            given = {f"member.{name}": value for name, value in zip(self.names, values, strict=True)}
            return functional_call(self._call[0], given, (run, *arguments))
        if values is not self._current:
            for name, value in zip(self.names, values, strict=True):
                owner, leaf = self._place(name)
                setattr(owner, leaf, value)
            self._current = values
        return getattr(self.of, run)(*arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._run("affine", x, bias)

    def convolve(self, x: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
        return self._run("convolve", x, geometry, bias)

    def to_dense(self) -> Tensor:
        return self._run("to_dense")

    def rows(self, indices: Tensor) -> Tensor:
        return self._run("rows", indices)

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        return self.of.multiply_adds(geometry)

    def parameter_count(self) -> int:
        packed = sum(part.parameter_count() for part in self.parts().values())
        inside = {f"{name}{_PACKED}." for name in self.names}
        rest = (
            tensor.numel()
            for name, tensor in self.of.state_dict().items()
            if tensor.is_floating_point() and not any(name.startswith(prefix) for prefix in inside)
        )
        return packed + sum(rest)

    def picture(self) -> list[Rectangle]:
        return self.of.picture()

    def _exchanged(self, exchange: str) -> tuple[StructuredMatrix, dict[str, StructuredMatrix]]:
        """The plain inner member, and its packed tensors relaxed or hardened."""
        stored = {name: tensor.clone() for name, tensor in self.of.stored().items()}
        for name in self.names:
            stored = {
                key: tensor
                for key, tensor in stored.items()
                if not key.startswith(f"{name}{_PACKED}.") and key != name + _SIZES
            }
        with torch.no_grad():
            for name, value in zip(self.names, self.values(), strict=True):
                stored[name] = value.detach().clone()
        inner = self.of.structure.from_tensors(self.shape, stored)
        return inner, {name: getattr(part, exchange)() for name, part in self.parts().items()}


class _Call(nn.Module):
    """A member's methods as a module's forward, as `functional_call` wants them."""

    def __init__(self, member: StructuredMatrix) -> None:
        super().__init__()
        self.member = member

    def forward(self, run: str, *arguments: object) -> Tensor:
        return getattr(self.member, run)(*arguments)


class QuantizedTensors(_Tensors):
    """A member of `Quantized` of a family that is no product of matrices."""

    def relax(self) -> "RelaxedTensors":
        return RelaxedTensors(self.kind, self.shape, *self._exchanged("relax"))


class RelaxedTensors(_Tensors):
    """Another family's member with quantised tensors in training."""

    def harden(self) -> QuantizedTensors:
        hard = QuantizedTensors(self.kind, self.shape, *self._exchanged("harden"))
        return hard.train(self.training)
