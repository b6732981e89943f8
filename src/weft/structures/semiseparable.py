"""Sequentially semiseparable: a matrix as a time-varying system that runs through its rows and columns.

The weight's rows and columns are divided into p stages as evenly as possible. Causal states x_k carry what
earlier columns do to later rows, anticausal states z_k what later columns do to earlier rows:

    x_{k+1} = A_k x_k + B_k u_k,    z_{k−1} = E_k z_k + F_k u_k,    y_k = C_k x_k + D_k u_k + G_k z_k,

so that W = D + C(I − ZA)⁻¹ZB + G(I − ZᵀE)⁻¹ZᵀF. One application costs as many multiply-adds as there are
coefficients, so it is linear in p for given stages; only the small products with A and E wait for one
another. Its gradients go back through the same states (backpropagation through states, Kissel and Diepold
2022): with ŷ the gradient of y, that of x_k is Aₖᵀ x̂_{k+1} + Cₖᵀ ŷ_k, and that of A_k is x̂_{k+1} x_kᵀ.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from weft import checks
from weft.kernels.block_sequence import Program, Segment, Space, Step, block_sequence_apply, write_program
from weft.numerics.gram import DiagonalGram, squared_error
from weft.numerics.hankel_realisation import (
    Realisation,
    StateSpace,
    balance,
    cast,
    realise,
    realise_weighted,
    stage_dimensions,
    state_bounds,
    truncation_error,
)
from weft.structures.base import (
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

StateDimensions = tuple[tuple[int, ...], tuple[int, ...]]

# Below this share of the largest, a coordinate of a diagonal Gram is taken as that share: it must be undone.
_LEAST_SCALE = 1e-13
_FULL_PRECISION = (torch.float32, torch.float64)
# The ladder of sizes ends here: with more stages the diagonal blocks are too small to matter to what a
# planner chooses among, while every step of the reduction still costs a decomposition.
_MOST_STAGES = 64
# An error curve has at most one point per factor of this in size; a weighted fit of each takes seconds.
_CURVE_RATIO = 1.25


class Run(NamedTuple):
    """Consecutive stages whose matrices of one role have the same shape: one batched product does them all.

    Attributes:
        first: the first stage.
        beyond: the stage after the last.
        shape: (number of stages, columns, rows).
        start: where the run begins in the role's flat tensor.
        stop: where it ends.
    """

    first: int
    beyond: int
    shape: tuple[int, int, int]
    start: int
    stop: int


class Role(NamedTuple):
    """One letter of the formula: its matrices in their flat tensor, stage after stage, each input-major.

    Attributes:
        name: the stored tensor's name.
        shapes: (rows, columns) per stage; with a zero where the stage has no such matrix.
    """

    name: str
    shapes: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """The number of coefficients."""
        return sum(rows * columns for rows, columns in self.shapes)

    def runs(self) -> tuple[Run, ...]:
        """The fewest runs that cover all matrices but the empty ones."""
        found, start = [], 0
        for (rows, columns), stages in itertools.groupby(
            range(len(self.shapes)), key=self.shapes.__getitem__
        ):
            members = list(stages)
            stop = start + len(members) * rows * columns
            if stop > start:
                found.append(Run(members[0], members[-1] + 1, (len(members), columns, rows), start, stop))
            start = stop
        return tuple(found)


@dataclass(frozen=True)
class SequentiallySemiseparable(Structure):
    """Matrices whose Hankel blocks, all that lies below or above a stage's corner, have low rank.

    Args:
        stages: p, the number of stages, at most the smaller side of the weight.
        state_dimension: d, the dimension of every state, less where the Hankel block is smaller; or one
        dimension
            per boundary between stages, first for the causal, then for the anticausal states.
        tolerance: instead, the relative error ‖W − Ŵ‖_F / ‖W‖_F that a plain fit may have at most; the state
            dimensions are then found from the weight. Where Grams are given, the fit gets these same
            dimensions and is nearest in the weighted norm.

    Raises:
        TypeError: a size is no whole number.
        ValueError: a size is out of bounds, or not exactly one of state dimension and tolerance is given.

    Examples:
        >>> SequentiallySemiseparable(stages=10, state_dimension=15).parameter_count((1000, 512))
        95615
    """

    source: ClassVar[str] = (
        "Dewilde and van der Veen, Time-Varying Systems and Computations, 1998; "
        "Kissel and Diepold, ESANN 2022, eqs. 1-3"
    )

    stages: int
    state_dimension: int | StateDimensions | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        checks.integer_between("stages", self.stages, 1, None)
        if (self.state_dimension is None) == (self.tolerance is None):
            got = f"state_dimension={self.state_dimension} and tolerance={self.tolerance}"
            remedy = "give state_dimension for a size or tolerance for an error"
            raise ValueError(
                checks.fault("sizes", "exactly one of state_dimension and tolerance", got, remedy)
            )
        if self.tolerance is not None:
            checks.positive("tolerance", self.tolerance)
        elif isinstance(self.state_dimension, tuple):
            if [len(side) for side in self.state_dimension] != [self.stages - 1] * 2:
                expected = f"a number, or two tuples of {self.stages - 1}, one number per boundary"
                remedy = "give the causal and the anticausal dimensions"
                raise ValueError(checks.fault("state_dimension", expected, self.state_dimension, remedy))
            for dimension in itertools.chain(*self.state_dimension):
                checks.integer_between("state_dimension", dimension, 0, None)
        else:
            checks.integer_between("state_dimension", self.state_dimension, 0, None)

    # -- sizes

    @classmethod
    def candidates(cls, shape: Shape, inner: Iterable[Structure] = ()) -> Iterator[Self]:
        outputs, inputs = matrix_shape(shape)
        smaller = min(outputs, inputs)
        if smaller == 1:
            yield cls(1, 0)
            return
        found = []
        for stages in ladder(2, min(smaller, _MOST_STAGES), ratio=2):
            largest = max(map(max, state_bounds(*_blocks(shape, stages))))
            for dimension in ladder(1, largest, ratio=1.5):
                candidate = cls(stages, dimension)
                if candidate._count(shape) >= outputs * inputs:
                    break
                found.append(candidate)
        yield from sorted(found, key=lambda each: (each._count(shape), each.stages)) or [cls(2, 0)]

    def dimensions(self, shape: Shape) -> StateDimensions | None:
        """The state dimensions between stages k − 1 and k, for k = 1 … p − 1.

        Args:
            shape: the weight's shape.

        Returns:
            Those of the causal and of the anticausal states; None where they depend on the weight.
        """
        if self.state_dimension is None or isinstance(self.state_dimension, tuple):
            return self.state_dimension
        causal, anticausal = state_bounds(*_blocks(shape, self.stages))
        limit = self.state_dimension
        return tuple(min(limit, bound) for bound in causal), tuple(min(limit, bound) for bound in anticausal)

    def roles(self, shape: Shape) -> tuple[Role, ...] | None:
        """The stored tensors' contents, in the order A, B, C, D, E, F, G of the formula.

        Args:
            shape: the weight's shape.

        Returns:
            The seven roles; None where their sizes depend on the weight.
        """
        dimensions = self.dimensions(shape)
        if dimensions is None:
            return None
        rows, columns = _blocks(shape, self.stages)
        before, after = (0, *dimensions[0]), (*dimensions[0], 0)  # of x_k and x_{k+1}
        ahead, behind = (*dimensions[1], 0), (0, *dimensions[1])  # of z_k and z_{k−1}
        return (
            Role("causal_transition", tuple(zip(after, before, strict=True))),
            Role("causal_input", tuple(zip(after, columns, strict=True))),
            Role("causal_output", tuple(zip(rows, before, strict=True))),
            Role("direct", tuple(zip(rows, columns, strict=True))),
            Role("anticausal_transition", tuple(zip(behind, ahead, strict=True))),
            Role("anticausal_input", tuple(zip(behind, columns, strict=True))),
            Role("anticausal_output", tuple(zip(rows, ahead, strict=True))),
        )

    def parameter_count(self, shape: Shape) -> int | None:
        roles = self.roles(shape)
        return None if roles is None else sum(role.size for role in roles)

    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int | None:
        count = self.parameter_count(shape)
        return None if count is None else matrix_multiply_adds(count, shape, geometry)

    def check(self, shape: Shape) -> None:
        outputs, inputs = matrix_shape(shape)
        owner = f"a {tuple(shape)} weight"
        checks.integer_between("stages", self.stages, 1, min(outputs, inputs), of=owner)
        if isinstance(self.state_dimension, int):
            checks.integer_between("state_dimension", self.state_dimension, 0, min(outputs, inputs), of=owner)
        elif self.state_dimension is not None:
            bounds = state_bounds(*_blocks(shape, self.stages))
            for dimension, bound in zip(
                itertools.chain(*self.state_dimension), itertools.chain(*bounds), strict=True
            ):
                checks.integer_between("state_dimension", dimension, 0, bound, of=f"a boundary of {owner}")

    @classmethod
    def search(
        cls,
        weight: Tensor,
        parameters: float | int,
        *,
        input_gram: Gram | None = None,
        output_gram: Gram | None = None,
    ) -> Self:
        """Chooses stages and state dimension for a number of parameters.

        For each number of stages the largest state dimension that the budget allows is taken, and the pair
        with the least truncation error wins. The grid is geometric from the fewest stages whose diagonal
        blocks fit into the budget, and is refined around its best point. Of Grams only the diagonals count
        here.

        Args:
            weight: W, shape (outputs, inputs) or (outputs, channels, *kernel).
            parameters: a share of the dense weight's if a float up to 1, else a number of coefficients.
            input_gram: Ĝ of the layer's inputs.
            output_gram: H of the layer's outputs.

        Returns:
            The structure; it never has more parameters than asked for.

        Raises:
            ValueError: the budget is no share, or allows not even one coefficient per row and column.
        """
        checks.weight(weight)
        shape = tuple(weight.shape)
        outputs, inputs = matrix_shape(shape)
        if isinstance(parameters, float):
            budget = math.floor(checks.share("parameters", parameters) * outputs * inputs)
        else:
            budget = checks.integer_between("parameters", parameters, 1, None)
        smaller = min(outputs, inputs)
        # With p stages the diagonal blocks alone take about one p-th of the dense weight.
        fewest = next((p for p in range(1, smaller + 1) if cls(p, 0)._count(shape) <= budget), None)
        if fewest is None:
            least = cls(smaller, 0)._count(shape)
            remedy = "allow more parameters or choose another family"
            raise ValueError(
                checks.fault("parameters", f"at least {least} for a {shape} weight", budget, remedy)
            )
        # Single precision sends the reduction through Gram matrices, which is fast and exact enough to rank
        # sizes.
        matrix = weight.detach().to(torch.float32).flatten(1)
        if output_gram is not None:
            matrix = matrix * output_gram.diagonal().sqrt().to(matrix)[:, None]
        if input_gram is not None:
            matrix = matrix * input_gram.diagonal().sqrt().to(matrix)
        errors: dict[int, float] = {}

        def error(stages: int) -> float:
            if stages not in errors:
                structure = cls.largest(shape, stages, budget)
                dimensions = structure.dimensions(shape)
                assert dimensions is not None
                errors[stages] = truncation_error(matrix, *_blocks(shape, stages), dimensions)
            return errors[stages]

        most = max(fewest, smaller // 4, min(smaller, _MOST_STAGES))
        best = min(ladder(fewest, most, ratio=1.15), key=error)
        reach = best // 8
        while reach:
            around = [stages for stages in (best - reach, best + reach) if fewest <= stages <= smaller]
            best = min([best, *around], key=error)
            reach //= 2
        return cls.largest(shape, best, budget)

    @classmethod
    def largest(cls, shape: Shape, stages: int, budget: int) -> Self:
        """The structure with a given number of stages and the largest state dimension that a budget allows.

        Args:
            shape: the weight's shape.
            stages: p.
            budget: the most coefficients; the state dimension is 0 where the diagonal blocks take them all.

        Returns:
            The structure.
        """
        low, high = (
            0,
            max((max(side, default=0) for side in state_bounds(*_blocks(shape, stages))), default=0),
        )
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cls(stages, middle)._count(shape) <= budget else (low, middle - 1)
        return cls(stages, low)

    def _count(self, shape: Shape) -> int:
        """`parameter_count` of a structure whose sizes are known."""
        count = self.parameter_count(shape)
        assert count is not None
        return count

    # -- members

    def _fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None,
        output_gram: Gram | None,
        start: StructuredMatrix | None,
        generator: torch.Generator | None,
    ) -> "SequentiallySemiseparableMatrix":
        shape, matrix = tuple(weight.shape), weight.flatten(1)
        blocks = _blocks(shape, self.stages)
        best = realise(matrix, *blocks, state_dimensions=self.dimensions(shape), tolerance=self.tolerance)
        if input_gram is not None or output_gram is not None:
            starts = [best]
            if isinstance(start, SequentiallySemiseparableMatrix):
                given = start.realisation()
                if given.state_dimensions == best.state_dimensions and given.rows == best.rows:
                    starts.append(given)
            starts.append(_fit_weighted(matrix, starts, input_gram, output_gram))
            exact = matrix.to(torch.float64)

            def error(realisation: Realisation) -> float:
                distance = exact - cast(realisation, torch.float64).dense()
                return float(squared_error(distance, input_gram, output_gram))

            best = min(starts, key=error)
        structure = self
        if self.tolerance is not None:
            structure = SequentiallySemiseparable(self.stages, best.state_dimensions)
        return SequentiallySemiseparableMatrix.from_realisation(structure, shape, best)

    def initialise(
        self, shape: Shape, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> "SequentiallySemiseparableMatrix":
        self.check(shape)
        dimensions = self.dimensions(shape)
        if dimensions is None:  # without a weight there is no rank but a share of the Hankel block's size
            bounds = state_bounds(*_blocks(shape, self.stages))
            causal_bounds, anticausal_bounds = (tuple(-(-bound // 4) for bound in side) for side in bounds)
            known = SequentiallySemiseparable(self.stages, (causal_bounds, anticausal_bounds))
            return known.initialise(shape, dtype=dtype, generator=generator)
        rows, columns = _blocks(shape, self.stages)
        causal = _random_states(columns, dimensions[0], dtype, generator)
        anticausal = _random_states(columns[::-1], dimensions[1][::-1], dtype, generator)
        causal_output, direct, anticausal_output = [], [], []
        for height, before, width, ahead in zip(
            rows, (0, *dimensions[0]), columns, (*dimensions[1], 0), strict=True
        ):
            # States and inputs have unit variance, so this gives the outputs unit variance.
            fan_in = before + width + ahead
            block = torch.randn(height, fan_in, dtype=dtype, generator=generator) / math.sqrt(fan_in)
            parts = block.split([before, width, ahead], 1)
            causal_output.append(parts[0])
            direct.append(parts[1])
            anticausal_output.append(parts[2])
        realisation = Realisation(
            StateSpace(*causal, tuple(causal_output)),
            tuple(direct),
            StateSpace(anticausal[0][::-1], anticausal[1][::-1], tuple(anticausal_output)),
        )
        return SequentiallySemiseparableMatrix.from_realisation(self, shape, realisation)

    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> "SequentiallySemiseparableMatrix":
        self.check(shape)
        expected = {role.name: (role.size,) for role in _known_roles(self, shape) if role.size}
        checks.tensor_names(tensors.keys(), list(expected), str(self))
        for name, size in expected.items():
            checks.shape(name, tensors[name].shape, size, "load the file that belongs to this model")
        return SequentiallySemiseparableMatrix(self, shape, **tensors)

    @classmethod
    def curve_sizes(cls, weight: Tensor) -> list[Structure]:
        """Of candidates of about the same size that which truncates best, where it beats all smaller ones."""
        shape = tuple(weight.shape)
        matrix = weight.detach().to(torch.float32).flatten(1)
        best: dict[int, tuple[float, Self]] = {}
        for structure in cls.candidates(shape):
            dimensions = structure.dimensions(shape)
            assert dimensions is not None
            estimate = truncation_error(matrix, *_blocks(shape, structure.stages), dimensions)
            size = math.floor(math.log(structure._count(shape), _CURVE_RATIO))
            best[size] = min(
                best.get(size, (math.inf, structure)), (estimate, structure), key=lambda pair: pair[0]
            )
        kept, least = [], math.inf
        for _, (estimate, structure) in sorted(best.items()):
            if estimate < least:
                least = estimate
                kept.append(structure)
        return kept


class SequentiallySemiseparableMatrix(StructuredMatrix):
    """A member of `SequentiallySemiseparable`.

    Stores one flat tensor per role, without padding: the stages' matrices one after the other, each
    row-major. `causal_transition` A, `causal_input` B, `causal_output` C, `direct` D, `anticausal_transition`
    E, `anticausal_input` F, `anticausal_output` G; a role without coefficients is left out.
    """

    direct: nn.Parameter

    def __init__(self, structure: SequentiallySemiseparable, shape: Shape, **tensors: Tensor) -> None:
        super().__init__(structure, shape)
        self.stages = structure.stages
        self._roles = _known_roles(structure, self.shape)
        self._runs = {role.name: role.runs() for role in self._roles}
        self._rows, self._columns = _blocks(self.shape, structure.stages)
        self._above, self._left = _offsets(self._rows), _offsets(self._columns)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.contiguous()))
        self._program = _write_program(self._roles, self._above, self._left)
        self.native_call = self._program.native_call

    @classmethod
    def from_realisation(
        cls, structure: SequentiallySemiseparable, shape: Shape, realisation: Realisation
    ) -> "SequentiallySemiseparableMatrix":
        """The member that stores a realisation's matrices.

        Args:
            structure: the family with the realisation's own sizes.
            shape: the weight's own shape.
            realisation: stage matrices of these sizes.

        Returns:
            The member.
        """
        parts = (*realisation.causal, realisation.direct, *realisation.anticausal)
        tensors = {
            role.name: torch.cat([block.T.flatten() for block in blocks])
            for role, blocks in zip(_known_roles(structure, shape), parts, strict=True)
            if role.size
        }
        return cls(structure, shape, **tensors)

    def realisation(self) -> Realisation:
        """The stage matrices, as views of the stored tensors."""
        parts = []
        for role in self._roles:
            flat = getattr(self, role.name) if role.size else self.direct.new_empty(0)
            pieces = flat.split([rows * columns for rows, columns in role.shapes])
            parts.append(
                tuple(piece.view(shape[::-1]).T for piece, shape in zip(pieces, role.shapes, strict=True))
            )
        return Realisation(StateSpace(*parts[:3]), parts[3], StateSpace(*parts[4:]))

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return block_sequence_apply(x, self._parameters, self._program, bias, self._by_runs)

    def _by_runs(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product of PyTorch's operations: one batched product per run, one small one per transition."""
        checks.last_dimension(x, self.inputs)
        # In half precision the rounding of the states would add up from stage to stage.
        working = x.dtype if x.dtype in _FULL_PRECISION else torch.float32
        u = x.reshape(-1, self.inputs)
        u = u if u.dtype == working else u.to(working)
        y = self._side_by_side("direct", self._from_inputs("direct", u), u)
        for direction, step in (("causal", 1), ("anticausal", -1)):
            name = f"{direction}_output"
            runs = self._runs[name]
            if runs:
                states = self._states(direction, step, u)
                stacks = [torch.stack(states[run.first : run.beyond]) for run in runs]
                products = list(map(torch.bmm, stacks, self._matrices(name, working)))
                y = y + self._side_by_side(name, products, u)
        y = y.view(*x.shape[:-1], self.outputs)
        y = y if y.dtype == x.dtype else y.to(x.dtype)
        return y if bias is None else y + bias

    def _matrices(self, name: str, working: torch.dtype) -> list[Tensor]:
        """A role's transposed matrices, one view of shape (count, columns, rows) per run."""
        runs = self._runs[name]
        if not runs:
            return []
        flat = getattr(self, name)
        flat = flat if flat.dtype == working else flat.to(working)
        if len(runs) == 1:
            return [flat.view(runs[0].shape)]
        return [flat[run.start : run.stop].view(run.shape) for run in runs]

    def _from_inputs(self, name: str, u: Tensor) -> list[Tensor]:
        """A role's matrices times its stages' inputs, per run: (count, batch, rows)."""
        batch, left, products = u.shape[0], self._left, []
        for run, matrices in zip(self._runs[name], self._matrices(name, u.dtype), strict=True):
            count, width, _ = run.shape
            part = u[:, left[run.first] : left[run.beyond]].view(batch, count, width)
            products.append(torch.bmm(part.transpose(0, 1), matrices))
        return products

    def _by_stage(self, name: str, stacks: list[Tensor]) -> list[Tensor | None]:
        """A role's entries by stage, from one stack per run; None for stages without an entry."""
        entries: list[Tensor | None] = [None] * self.stages
        for run, stack in zip(self._runs[name], stacks, strict=True):
            entries[run.first : run.beyond] = stack.unbind()
        return entries

    def _states(self, direction: str, step: int, u: Tensor) -> list[Tensor]:
        """The states before all stages, s_{k + step} = T_k s_k + what stage k adds; empty ones too."""
        transition, entry, stages = f"{direction}_transition", f"{direction}_input", self.stages
        matrices = self._by_stage(transition, self._matrices(transition, u.dtype))
        added = self._by_stage(entry, self._from_inputs(entry, u))
        states = [u[:, :0]] * stages
        for k in range(stages - 1) if step > 0 else range(stages - 1, 0, -1):
            fresh, matrix = added[k], matrices[k]
            if fresh is not None:
                states[k + step] = fresh if matrix is None else torch.addmm(fresh, states[k], matrix)
        return states

    def _side_by_side(self, name: str, products: list[Tensor], u: Tensor) -> Tensor:
        """The stages' outputs in one row, zeros where a stage has none: (batch, outputs)."""
        batch, above, reached, pieces = u.shape[0], self._above, 0, []
        for run, product in zip(self._runs[name], products, strict=True):
            start, stop = above[run.first], above[run.beyond]
            if start > reached:
                pieces.append(u.new_zeros(batch, start - reached))
            pieces.append(product.transpose(0, 1).reshape(batch, stop - start))
            reached = stop
        if reached < self.outputs:
            pieces.append(u.new_zeros(batch, self.outputs - reached))
        return torch.cat(pieces, 1)

    def to_dense(self) -> Tensor:
        dtype = self.direct.dtype
        dense = cast(self.realisation(), torch.promote_types(dtype, torch.float32)).dense()
        return dense.to(dtype).reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        dtype = self.direct.dtype
        system = cast(self.realisation(), torch.promote_types(dtype, torch.float32))
        wanted, stages = indices.reshape(-1), self.stages
        stage = torch.bucketize(wanted, torch.tensor(self._above[1:], device=wanted.device), right=True)

        def own(blocks: Sequence[Tensor], k: int) -> Tensor:
            """The wanted rows of stage k's block, zeros for the rows of other stages."""
            local = (wanted - self._above[k]).clamp(0, self._rows[k] - 1)
            return blocks[k][local] * (stage == k)[:, None]

        # A row vector meets the states in the opposite order: it goes up through the causal ones.
        parts = [own(system.direct, k) for k in range(stages)]
        if stages > 1:
            transition, entry, output = system.causal
            carried = own(output, stages - 1)
            for k in range(stages - 1, 0, -1):
                parts[k - 1] = parts[k - 1] + carried @ entry[k - 1]
                carried = carried @ transition[k - 1] + own(output, k - 1)
            transition, entry, output = system.anticausal
            carried = own(output, 0)
            for k in range(1, stages):
                parts[k] = parts[k] + carried @ entry[k]
                carried = carried @ transition[k] + own(output, k)
        return torch.cat(parts, 1).to(dtype).reshape(*indices.shape, self.inputs)

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        return matrix_multiply_adds(self.parameter_count(), self.shape, geometry)

    def picture(self) -> list[Rectangle]:
        drawn = []
        above, left = self._above, self._left
        causal, anticausal = self.realisation().state_dimensions
        before, ahead = (0, *causal), (*anticausal, 0)
        for k, (height, width) in enumerate(zip(self._rows, self._columns, strict=True)):
            drawn.append(Rectangle(above[k], left[k], height, width))
            if k:
                drawn.append(_low_rank(above[k], 0, height, left[k], before[k]))
            if left[k + 1] < self.inputs:
                drawn.append(_low_rank(above[k], left[k + 1], height, self.inputs - left[k + 1], ahead[k]))
        return drawn


def _low_rank(row: int, column: int, rows: int, columns: int, dimension: int) -> Rectangle:
    if not dimension:
        return Rectangle(row, column, rows, columns, "zero")
    return Rectangle(row, column, rows, columns, "low_rank", str(dimension))


def _write_program(roles: Sequence[Role], above: Sequence[int], left: Sequence[int]) -> Program:
    """The two recurrences beside each other, then every stage's outputs from its inputs and states."""
    sizes = [role.size for role in roles if role.size]
    place = {role.name: index for index, role in enumerate(role for role in roles if role.size)}
    names = {role.name: role for role in roles}
    starts = {role.name: _offsets([rows * columns for rows, columns in role.shapes]) for role in roles}
    stages = len(above) - 1

    def segment(name: str, k: int, space: Space, offset: int) -> list[Segment]:
        """Stage k's matrix of a role, met by what stands at the offset; none where it is empty."""
        rows, columns = names[name].shapes[k]
        if not rows * columns:
            return []
        return [Segment(place[name], starts[name][k], rows, space, offset, columns)]

    recurrences: list[list[Step]] = []
    before: dict[str, list[int]] = {}  # of each direction, where the states before stage k stand
    reached = 0
    for direction, step in (("causal", 1), ("anticausal", -1)):
        steps: list[Step] = []
        before[direction] = [0] * stages
        for k in range(stages - 1) if step > 0 else range(stages - 1, 0, -1):
            dimension = names[f"{direction}_input"].shapes[k][0]
            # The inputs' part comes first: it does not wait for the states.
            parts = segment(f"{direction}_input", k, Space.INPUT, left[k])
            parts += segment(f"{direction}_transition", k, Space.STATE, before[direction][k])
            before[direction][k + step] = reached
            if dimension:
                steps.append(Step(Space.STATE, reached, dimension, tuple(parts)))
            reached += dimension
        if steps:
            recurrences.append(steps)
    outputs = []
    for k in range(stages):
        parts = segment("direct", k, Space.INPUT, left[k])
        for direction in ("causal", "anticausal"):
            parts += segment(f"{direction}_output", k, Space.STATE, before[direction][k])
        outputs.append([Step(Space.OUTPUT, above[k], above[k + 1] - above[k], tuple(parts))])
    phases = [recurrences, outputs] if recurrences else [outputs]
    return write_program(left[-1], above[-1], reached, sizes, phases, names=place)


def _known_roles(structure: SequentiallySemiseparable, shape: Shape) -> tuple[Role, ...]:
    roles = structure.roles(shape)
    if roles is None:
        remedy = "give state_dimension, or use the structure of a fitted member"
        raise ValueError(checks.fault("structure", "one of known size", str(structure), remedy))
    return roles


def _blocks(shape: Shape, stages: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows and columns of each stage."""
    outputs, inputs = matrix_shape(shape)
    return stage_dimensions(outputs, stages), stage_dimensions(inputs, stages)


def _offsets(sizes: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(sizes)]


def _fit_weighted(
    matrix: Tensor, starts: Sequence[Realisation], input_gram: Gram | None, output_gram: Gram | None
) -> Realisation:
    """A realisation near the best in the weighted norm."""
    # A diagonal metric scales rows or columns and leaves the order of stages alone; only a dense one needs
    # descent.
    rows, output_metric = _scale_or_metric(output_gram)
    columns, input_metric = _scale_or_metric(input_gram)
    scaled = matrix.to(torch.float64)
    scaled = scaled if rows is None else scaled * rows[:, None]
    scaled = (scaled if columns is None else scaled * columns).to(matrix.dtype)
    first = starts[0]
    plain = realise(scaled, first.rows, first.columns, state_dimensions=first.state_dimensions)
    if input_metric is not None or output_metric is not None:
        plain = realise_weighted(
            scaled,
            first.rows,
            first.columns,
            starts=[plain, *(cast(start, torch.float64).scale(rows, columns) for start in starts)],
            input_metric=input_metric,
            output_metric=output_metric,
        )
    unscaled = cast(plain, torch.float64).scale(
        None if rows is None else rows.reciprocal(), None if columns is None else columns.reciprocal()
    )
    return cast(balance(unscaled), matrix.dtype)


def _scale_or_metric(gram: Gram | None) -> tuple[Tensor | None, Tensor | None]:
    """The square roots of a diagonal Gram, or else the dense matrix, blocks averaged."""
    if gram is None:
        return None, None
    if isinstance(gram, DiagonalGram):
        diagonal = gram.diagonal()
        return diagonal.clamp_min(_LEAST_SCALE * float(diagonal.max())).sqrt(), None
    return None, gram.dense()


def _random_states(
    columns: Sequence[int],
    dimensions: Sequence[int],
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Transitions and inputs of causal states that keep unit variance and remember all stages alike."""
    # State k + 1 is √(k/(k+1)) of an orthogonal image of state k and √(1/(k+1)) of the fresh inputs, so that
    # after k stages each of them has the same weight; every transition has norm below 1.
    transition, entry = [], []
    for k, (before, width, after) in enumerate(zip((0, *dimensions), columns, (*dimensions, 0), strict=True)):
        memory = k / (k + 1)
        kept = torch.empty(after, before, dtype=torch.promote_types(dtype, torch.float32))
        fresh = torch.empty(after, width, dtype=kept.dtype)
        if kept.numel():
            nn.init.orthogonal_(kept, math.sqrt(memory), generator=generator)
        if fresh.numel():
            # Rows of orthonormal columns are shorter than 1; what they lack is made up for here.
            carried = memory * min(1.0, before / after)
            nn.init.orthogonal_(
                fresh, math.sqrt((1 - carried) * max(1.0, after / width)), generator=generator
            )
        transition.append(kept.to(dtype))
        entry.append(fresh.to(dtype))
    return tuple(transition), tuple(entry)
