"""Product quantisation: every piece of a row is one of a few codewords, and only its number is stored.

A row is cut into `subspaces` pieces of equal width. The codes are chosen for the layer's inputs: in the
metric Ĝ, with the error of every subspace handed on to the later ones, then by coordinate descent between
least-squares solutions for codebooks and scales.

Few vectors are multiplied by looking up entries of a table of codewords times pieces of x, natively; for
many, a few rows of the weight at a time are written down. Without native code, and beyond 256 codewords, all
of it is decoded once and kept for as long as the stored tensors stay as they are: then only storage shrinks.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import checks
from weft.kernels.codewords import codewords_apply
from weft.numerics.vector_quantisation import Codes, book_of, quantise, synthesise
from weft.structures.base import (
    Geometry,
    Gram,
    Rectangle,
    Shape,
    Structure,
    StructuredMatrix,
    matrix_multiply_adds,
    matrix_shape,
)

_MOST_CODEWORDS = 1 << 16


@dataclass(frozen=True)
class ProductQuantized(Structure):
    """Matrices whose rows are put together from codewords.

    Piece s of row i is scale_i · codebooks[book(s)][code(i, s)]. A convolution's kernel (outputs, channels,
    *kernel) is taken as the matrix (outputs, channels · kernel).

    Args:
        subspaces: into how many pieces a row is cut; divides the weight's inputs.
        codewords: how many per codebook, at most 65536; a code takes 4 bits up to 16 codewords, a byte up to
            256, two bytes beyond.
        codebooks: how many codebooks, shared by neighbouring subspaces: 1 for all, as many as subspaces for
            one each, as published. One serves best where the weight has few rows: 256 codewords for each of
            160 subspaces of 1280 inputs hold a quarter of the numbers of a weight of 1000 rows.
        scaled: whether every row has a scale of its own.

    Raises:
        TypeError: a count is no whole number, or `scaled` no truth value.
        ValueError: a count is out of bounds.

    Examples:
        >>> member = ProductQuantized(subspaces=32, codewords=16).fit(torch.randn(100, 128))
        >>> member.cost().bytes  # half a byte per code, 16 codewords of 4 numbers, 100 scales
        2256
    """

    source: ClassVar[str] = "Gong et al. 2014, section 3.3; van Baalen et al. 2024 (choice of the codes)"

    subspaces: int
    codewords: int
    codebooks: int = 1
    scaled: bool = True

    def __post_init__(self) -> None:
        checks.integer_between("subspaces", self.subspaces, 1, None)
        checks.integer_between("codewords", self.codewords, 1, _MOST_CODEWORDS)
        checks.integer_between(
            "codebooks", self.codebooks, 1, self.subspaces, of=f"{self.subspaces} subspaces"
        )
        if not isinstance(self.scaled, bool):
            remedy = "pass True for a scale per row"
            raise TypeError(checks.fault("scaled", "True or False", repr(self.scaled), remedy))

    @classmethod
    def candidates(cls, shape: Shape, inner: Iterable[Structure] = ()) -> Iterator[Self]:
        outputs, inputs = matrix_shape(shape)
        # Half a bit, one and two bits per entry; small codebooks where larger ones would save nothing.
        ladder = [(16, 256), (8, 256), (4, 256), (2, 16)]
        if 4 * 4 * 256 > outputs * inputs:
            ladder = [(8, 16), (4, 16), (2, 16), (1, 16)]
        found = [
            cls(inputs // width, codewords)
            for width, codewords in ladder
            if inputs % width == 0 and 4 * codewords * width <= outputs * inputs
        ]
        yield from sorted(found, key=lambda one: (one.parameter_count(shape), one.subspaces))

    # Real coefficients before coding, as for every quantised weight; the codes count in bytes.
    def parameter_count(self, shape: Shape) -> int:
        outputs, inputs = matrix_shape(shape)
        own = self.codebooks * self.codewords * (inputs // self.subspaces)
        return outputs * inputs + own + (outputs if self.scaled else 0)

    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int:
        return matrix_multiply_adds(math.prod(matrix_shape(shape)), shape, geometry)

    def check(self, shape: Shape) -> None:
        outputs, inputs = matrix_shape(shape)
        owner = f"a {tuple(shape)} weight"
        if self.subspaces > inputs or inputs % self.subspaces:
            divisors = [size for size in range(1, inputs + 1) if inputs % size == 0]
            near = min(divisors, key=lambda size: abs(size - self.subspaces))
            expected = f"a divisor of {inputs}, the inputs of {owner}"
            raise ValueError(checks.fault("subspaces", expected, self.subspaces, f"use e.g. {near}"))
        most = outputs * (self.subspaces // self.codebooks)
        checks.integer_between("codewords", self.codewords, 1, most, of=owner)

    def _fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None,
        output_gram: Gram | None,
        start: StructuredMatrix | None,
        generator: torch.Generator | None,
    ) -> "ProductQuantizedMatrix":
        seed = 0 if generator is None else generator.initial_seed() % (1 << 31)
        given = start.as_codes(weight) if isinstance(start, ProductQuantizedMatrix) else None
        found = quantise(
            weight.flatten(1),
            self.subspaces,
            self.codewords,
            self.codebooks,
            scaled=self.scaled,
            input_gram=input_gram,
            output_gram=output_gram,
            start=given if start is not None and start.structure == self else None,
            seed=seed,
        )
        return self._member(weight.shape, found)

    def _member(self, shape: Shape, found: Codes) -> "ProductQuantizedMatrix":
        codes = _pack(found.codes, self.codewords)
        return ProductQuantizedMatrix(
            self, shape, codes, found.codebooks, found.scales if self.scaled else None
        )

    def initialise(
        self, shape: Shape, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> "ProductQuantizedMatrix":
        self.check(shape)
        generator = generator or torch.Generator().manual_seed(0)
        outputs, inputs = matrix_shape(shape)
        size = (self.codebooks, self.codewords, inputs // self.subspaces)
        codebooks = torch.randn(size, dtype=dtype, generator=generator) / math.sqrt(inputs)
        codes = torch.randint(self.codewords, (outputs, self.subspaces), generator=generator)
        return self._member(shape, Codes(codes, codebooks, torch.ones(outputs, dtype=dtype)))

    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> "ProductQuantizedMatrix":
        self.check(shape)
        names = ["codes", "codebooks", *(["scales"] if self.scaled else [])]
        checks.tensor_names(tensors.keys(), names, str(self))
        outputs, inputs = matrix_shape(shape)
        remedy = "load the file that belongs to this model"
        packed = _packed_shape(outputs, self.subspaces, self.codewords)
        checks.shape("codes", tensors["codes"].shape, packed, remedy)
        size = (self.codebooks, self.codewords, inputs // self.subspaces)
        checks.shape("codebooks", tensors["codebooks"].shape, size, remedy)
        if self.scaled:
            checks.shape("scales", tensors["scales"].shape, (outputs,), remedy)
        largest = int(_unpack(tensors["codes"], self.subspaces, self.codewords).max())
        if largest >= self.codewords:
            raise ValueError(checks.fault("codes", f"below {self.codewords}", largest, remedy))
        return ProductQuantizedMatrix(
            self, shape, tensors["codes"], tensors["codebooks"], tensors.get("scales")
        )


def _packed_shape(outputs: int, subspaces: int, codewords: int) -> tuple[int, ...]:
    if codewords <= 16:
        return (outputs, (subspaces + 1) // 2)
    return (outputs, subspaces) if codewords <= 256 else (outputs, subspaces, 2)


def _pack(codes: Tensor, codewords: int) -> Tensor:
    """Codes (outputs, subspaces) as bytes: two to a byte, the even one low; one; or two bytes, low first."""
    if codewords <= 16:
        padded = F.pad(codes, (0, codes.shape[1] % 2))
        return (padded[:, ::2] + 16 * padded[:, 1::2]).to(torch.uint8)
    if codewords <= 256:
        return codes.to(torch.uint8)
    return torch.stack([codes & 0xFF, codes >> 8], dim=2).to(torch.uint8)


def _unpack(packed: Tensor, subspaces: int, codewords: int) -> Tensor:
    """Undoes `_pack`: int64, shape (outputs, subspaces)."""
    wide = packed.to(torch.int64)
    if codewords <= 16:
        return torch.stack([wide & 15, wide >> 4], dim=2).flatten(1)[:, :subspaces]
    return wide if codewords <= 256 else wide[..., 0] + 256 * wide[..., 1]


class ProductQuantizedMatrix(StructuredMatrix):
    """A member of `ProductQuantized`.

    Stores `codes` as bytes (outputs, packed), `codebooks` (codebooks, codewords, width) and, where there are
    scales, `scales` (outputs,). Codebooks and scales train; the codes stay.
    """

    codes: Tensor

    def __init__(
        self,
        structure: ProductQuantized,
        shape: Shape,
        codes: Tensor,
        codebooks: Tensor,
        scales: Tensor | None = None,
    ) -> None:
        super().__init__(structure, shape)
        self.subspaces, self.codewords = structure.subspaces, structure.codewords
        self.register_buffer("codes", codes.contiguous())
        self.codebooks = nn.Parameter(codebooks.contiguous())
        self.scales = None if scales is None else nn.Parameter(scales.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        words = self.derived("words", lambda: self.codebooks.mT.contiguous())
        return codewords_apply(x, self.codes, words, self.scales, bias, self.subspaces, self._composed)

    def _composed(self, x: Tensor, bias: Tensor | None) -> Tensor:
        checks.last_dimension(x, self.inputs)
        weight = self.derived("weight", self._decode)
        if x.dtype in {torch.float32, torch.float64}:
            return F.linear(x, weight.to(x.dtype), bias)
        # Half precisions are summed in single precision.
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    def _decode(self) -> Tensor:
        codes = _unpack(self.codes, self.subspaces, self.codewords)
        scales = self.codebooks.new_ones(self.outputs) if self.scales is None else self.scales
        return synthesise(codes, self.codebooks, scales)

    def _books(self) -> Tensor:
        return book_of(self.subspaces, self.codebooks.shape[0]).to(self.codes.device)

    def to_dense(self) -> Tensor:
        return self.rows(torch.arange(self.outputs, device=self.codes.device)).reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        chosen = indices.reshape(-1)
        codes = _unpack(self.codes[chosen], self.subspaces, self.codewords)
        words = self.codebooks.flatten(0, 1)[codes + self.codewords * self._books()]
        picked = words.flatten(1) if self.scales is None else words.flatten(1) * self.scales[chosen][:, None]
        return picked.reshape(*indices.shape, self.inputs)

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        return self.structure.multiply_adds(self.shape, geometry) or 0

    def parameter_count(self) -> int:
        """As of every quantised weight: its entries before coding, codebooks and scales."""
        return self.structure.parameter_count(self.shape) or 0

    def as_codes(self, like: Tensor) -> Codes:
        """The member as the algorithms know it.

        Args:
            like: a tensor of the wanted dtype and device.

        Returns:
            Codes, codebooks and scales, detached.
        """
        codes = _unpack(self.codes, self.subspaces, self.codewords)
        ones = like.new_ones(self.outputs)
        scales = ones if self.scales is None else self.scales.detach().to(ones)
        return Codes(codes.to(like.device), self.codebooks.detach().to(ones), scales)

    def picture(self) -> list[Rectangle]:
        books = [int(book) for book in self._books()]
        width = self.inputs // self.subspaces
        starts = [index for index, book in enumerate(books) if index == 0 or book != books[index - 1]]
        ends = [*starts[1:], len(books)]
        return [
            Rectangle(
                0, start * width, self.outputs, (end - start) * width, "coded", f"{self.codewords} words"
            )
            for start, end in zip(starts, ends, strict=True)
        ]
