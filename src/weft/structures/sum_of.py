"""Sums: W ≈ Θ₁ + Θ₂ + …, each term a structure of its own.

Low rank plus sparse, a coarse quantisation plus a low-rank correction, low rank imposed on two reshapes: what
one term cannot express cheaply, another may. The terms are fitted in turn, each to what the others leave. The
map from one round to the next is accelerated by Anderson's extrapolation, and real values of all terms are
solved for together at the end; supports and codes are chosen in the rounds only.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from weft import checks
from weft.numerics.gram import squared_error
from weft.structures.base import (
    Geometry,
    Gram,
    Rectangle,
    Shape,
    Structure,
    StructuredMatrix,
    check_nesting,
    refine_values,
)

_ROUNDS = 8
_TOLERANCE = 2e-3  # relative gain in the squared error below which rounds end
_MEMORY = 3  # rounds that an extrapolation looks back on
_MOST_CANDIDATES = 6


@dataclass(frozen=True)
class SumOf(Structure):
    """Sums of members of other families.

    Args:
        terms: the families with their sizes, at least one. Every term is once the first to be fitted, so that
            the sum is no worse than any term alone that could be followed by zeros.

    Raises:
        TypeError: a term is no structure.
        ValueError: there is no term, or wrappers are nested too deeply.

    Examples:
        >>> from weft.structures.low_rank import LowRank
        >>> SumOf((LowRank(rank=3), LowRank(rank=5))).parameter_count((1000, 512))
        12096
    """

    source: ClassVar[str] = "Idelbayev and Carreira-Perpinan 2021; Anderson 1965 (acceleration)"

    terms: tuple[Structure, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.terms, tuple):
            got = type(self.terms).__name__
            raise TypeError(checks.fault("terms", "a tuple of structures", got, "write SumOf((a, b))"))
        if not self.terms:
            remedy = "name a term, e.g. SumOf((LowRank(rank=8), Pruned(0.05)))"
            raise ValueError(checks.fault("terms", "at least one structure", "an empty sum", remedy))
        for term in self.terms:
            if not isinstance(term, Structure):
                remedy = "pass e.g. LowRank(rank=8)"
                raise TypeError(checks.fault("terms", "structures", repr(term), remedy))
        check_nesting(self)

    def __str__(self) -> str:
        return f"SumOf({' + '.join(map(str, self.terms))})"

    @classmethod
    def candidates(cls, shape: Shape, inner: Iterable[Structure] = ()) -> Iterator[Self]:
        # Two members of one family add up to little that a dearer one does not have.
        pairs = [(a, b) for a, b in combinations(inner, 2) if type(a) is not type(b)]
        found = []
        for pair in pairs:
            try:
                candidate = cls(pair)
                candidate.check(shape)
            except ValueError:  # nested too deeply, or of a size that another weight has
                continue
            found.append(candidate)
        if len(found) > _MOST_CANDIDATES:
            step = (len(found) - 1) / (_MOST_CANDIDATES - 1)
            found = [found[round(index * step)] for index in range(_MOST_CANDIDATES)]
        yield from sorted(found, key=lambda one: one.parameter_count(shape) or 0)

    def parameter_count(self, shape: Shape) -> int | None:
        return _total(term.parameter_count(shape) for term in self.terms)

    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int | None:
        return _total(term.multiply_adds(shape, geometry) for term in self.terms)

    def refusal(self, shape: Shape, geometry: Geometry | None = None) -> str | None:
        reasons = (term.refusal(shape, geometry) for term in self.terms)
        return next((reason for reason in reasons if reason is not None), None)

    def check(self, shape: Shape) -> None:
        for term in self.terms:
            term.check(shape)

    # -- members

    def _fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None,
        output_gram: Gram | None,
        start: StructuredMatrix | None,
        generator: torch.Generator | None,
    ) -> "SumOfMatrix":
        given = list(start.members()) if isinstance(start, SumOfMatrix) and start.structure == self else None
        plain = _Alternation(self.terms, weight, None, None, generator)
        best = plain.run([given] if given else [])
        if input_gram is not None or output_gram is not None:
            weighted = _Alternation(self.terms, weight, input_gram, output_gram, generator)
            best = weighted.run([given, best] if given else [best])
        return SumOfMatrix(self, weight.shape, best)

    def initialise(
        self, shape: Shape, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> "SumOfMatrix":
        self.check(shape)
        generator = generator or torch.Generator().manual_seed(0)
        drawn = [term.initialise(shape, dtype=dtype, generator=generator) for term in self.terms]
        return SumOfMatrix(self, shape, drawn)

    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> "SumOfMatrix":
        self.check(shape)
        own: list[dict[str, Tensor]] = [{} for _ in self.terms]
        surplus = []
        for name, tensor in tensors.items():
            group, _, rest = name.partition(".")
            index, _, inner = rest.partition(".")
            if group == "terms" and index.isdecimal() and int(index) < len(own) and inner:
                own[int(index)][inner] = tensor
            else:
                surplus.append(name)
        if surplus:
            known = [name for name in tensors if name not in surplus]
            checks.tensor_names(tensors.keys(), known, str(self))
        members = [term.from_tensors(shape, part) for term, part in zip(self.terms, own, strict=True)]
        return SumOfMatrix(self, shape, members)


def sum_of(members: Sequence[StructuredMatrix]) -> StructuredMatrix:
    """The sum of members of any families, of one shape.

    Args:
        members: the terms, at least one.

    Returns:
        A member of `SumOf`; `terms_of` takes it apart.
    """
    structure = SumOf(tuple(member.structure for member in members))
    for member in members[1:]:
        checks.shape("member", member.shape, members[0].shape, "add members that stand for the same weight")
    return SumOfMatrix(structure, members[0].shape, members)


def terms_of(member: StructuredMatrix) -> list[StructuredMatrix]:
    """The terms of a sum.

    Args:
        member: a sum; any other member is its own only term.

    Returns:
        The terms.
    """
    return member.members() if isinstance(member, SumOfMatrix) else [member]


def _total(counts: Iterable[int | None]) -> int | None:
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total


class _Alternation:
    """Terms fitted in turn to what the others leave of a weight, in one norm."""

    def __init__(
        self,
        terms: Sequence[Structure],
        weight: Tensor,
        input_gram: Gram | None,
        output_gram: Gram | None,
        generator: torch.Generator | None,
    ) -> None:
        self.terms, self.weight, self.generator = terms, weight, generator
        self.input_gram, self.output_gram = input_gram, output_gram

    def run(self, starts: Sequence[Sequence[StructuredMatrix]]) -> list[StructuredMatrix]:
        """The best members found, from the starts and from every term's turn to be first.

        Args:
            starts: members of all terms, any number of times.

        Returns:
            One member per term.
        """
        count = len(self.terms)
        tried = [[self._copy(index, member) for index, member in enumerate(start)] for start in starts]
        tried += [self._first([(shift + index) % count for index in range(count)]) for shift in range(count)]
        best = min(tried, key=self._error)
        if count == 1:
            return best
        best = self._rounds(best)
        refined = [self._copy(index, member) for index, member in enumerate(best)]
        whole = SumOfMatrix(SumOf(tuple(self.terms)), self.weight.shape, refined)
        grams = {"input_gram": self.input_gram, "output_gram": self.output_gram}
        refine_values(whole, self.weight, **grams, steps=4, products=12)
        return min(best, refined, key=self._error)

    def _first(self, order: Sequence[int]) -> list[StructuredMatrix]:
        """Every term fitted once, in a given order."""
        left = self.weight
        found: dict[int, StructuredMatrix] = {}
        for index in order:
            found[index] = self._fit(index, left, None)
            left = left - found[index].to_dense()
        return [found[index] for index in range(len(order))]

    def _rounds(self, members: list[StructuredMatrix]) -> list[StructuredMatrix]:
        """Rounds of fits, each from where an extrapolation of the last ones leads, while these help."""
        best, error = members, self._error(members)
        given = self._state(members)
        history: list[tuple[Tensor, Tensor]] = []  # (what a round came to, by how much it moved)
        for _ in range(_ROUNDS):
            members = self._round(given, best)
            reached, now = self._state(members), self._error(members)
            gain = error - now
            if gain > 0:
                best, error = members, now
            if gain <= _TOLERANCE * error:
                if not history:
                    break
                history = []  # the extrapolation led astray: go on from the best without it
                given = self._state(best)
                continue
            history = [*history, (reached, reached - given)][-_MEMORY:]
            given = _extrapolate(history)
        return best

    def _round(self, others: Tensor, members: Sequence[StructuredMatrix]) -> list[StructuredMatrix]:
        """Fits the first term to what the others, given as matrices, leave; then each of these in turn."""
        dense = [torch.zeros_like(self.weight), *others]
        found = []
        for index, member in enumerate(members):
            left = self.weight - sum(part for other, part in enumerate(dense) if other != index)
            fitted = self._fit(index, left, member)
            dense[index] = fitted.to_dense()
            found.append(fitted)
        return found

    def _fit(self, index: int, target: Tensor, start: StructuredMatrix | None) -> StructuredMatrix:
        return self.terms[index].fit(
            target,
            input_gram=self.input_gram,
            output_gram=self.output_gram,
            start=start,
            generator=self.generator,
        )

    def _copy(self, index: int, member: StructuredMatrix) -> StructuredMatrix:
        tensors = {name: tensor.clone() for name, tensor in member.stored().items()}
        return member.structure.from_tensors(self.weight.shape, tensors).to(self.weight.dtype)

    def _state(self, members: Sequence[StructuredMatrix]) -> Tensor:
        """What a round starts from: every term but the first, as matrices."""
        return torch.stack([member.to_dense() for member in members[1:]])

    def _error(self, members: Sequence[StructuredMatrix]) -> float:
        lost = self.weight - sum(member.to_dense().detach() for member in members)
        return float(squared_error(lost.flatten(1), self.input_gram, self.output_gram))


def _extrapolate(history: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Anderson: of what rounds came to, gₖ, the Σ αₖ gₖ with the smallest Σ αₖ fₖ of their moves; Σ α = 1."""
    if len(history) == 1:
        return history[0][0]
    moves = torch.stack([move.flatten() for _, move in history]).double()
    products = moves @ moves.T
    largest = float(products.diagonal().max())
    if not largest > 0:  # nothing moved any more
        return history[-1][0]
    products.diagonal().add_(1e-8 * largest)
    ones = torch.ones(len(history), dtype=torch.float64)
    weights = torch.linalg.solve(products, ones)
    weights /= weights.sum()
    mixed = sum(float(weight) * reached for weight, (reached, _) in zip(weights, history, strict=True))
    return mixed if isinstance(mixed, Tensor) else history[-1][0]


class SumOfMatrix(StructuredMatrix):
    """A member of `SumOf`: stores the terms' tensors, named "terms.", the number, a dot and their names."""

    def __init__(self, structure: SumOf, shape: Shape, terms: Sequence[StructuredMatrix]) -> None:
        # What came out may have other sizes than what was asked for, as a tolerance becomes ranks.
        super().__init__(SumOf(tuple(term.structure for term in terms)), shape)
        self.terms = nn.ModuleList(terms)

    def members(self) -> list[StructuredMatrix]:
        """The terms."""
        return [term for term in self.terms if isinstance(term, StructuredMatrix)]

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        first, *others = self.members()
        y = first.affine(x, bias)
        for term in others:
            y = y + term(x)
        return y

    def convolve(self, x: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
        first, *others = self.members()
        y = first.convolve(x, geometry, bias)
        for term in others:
            y = y + term.convolve(x, geometry)
        return y

    def to_dense(self) -> Tensor:
        first, *others = self.members()
        dense = first.to_dense()
        for term in others:
            dense = dense + term.to_dense()
        return dense

    def rows(self, indices: Tensor) -> Tensor:
        first, *others = self.members()
        rows = first.rows(indices)
        for term in others:
            rows = rows + term.rows(indices)
        return rows

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        return sum(term.multiply_adds(geometry) for term in self.members())

    def parameter_count(self) -> int:
        return sum(term.parameter_count() for term in self.members())

    def relax(self) -> StructuredMatrix:
        return self._exchanged([term.relax() for term in self.members()])

    def harden(self) -> StructuredMatrix:
        return self._exchanged([term.harden() for term in self.members()])

    def _exchanged(self, terms: Sequence[StructuredMatrix]) -> "SumOfMatrix":
        same = all(new is old for new, old in zip(terms, self.members(), strict=True))
        if same or not isinstance(self.structure, SumOf):
            return self
        return SumOfMatrix(self.structure, self.shape, terms)

    def picture(self) -> list[Rectangle]:
        """The terms' pictures over each other, whole blocks first so that smaller ones stay visible."""
        blocks = [block for term in self.members() for block in term.picture()]
        return sorted(blocks, key=lambda block: -block.rows * block.columns)
