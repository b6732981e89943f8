"""Products with matrices made of blocks, as a program of small products that run in one native call.

A step computes one stretch of a vector from stretches of others:

    target[to : to + size] = start + Σ source[from : from + depth] @ block,

where a block is `depth` rows of `size` numbers inside of a flat tensor that a family stores, so nothing is
packed or copied and a changed weight counts at once. Sources are the input, or what earlier phases gave as
states or as output; targets are states or the output. The first states may be gathered inputs, and sums start
from those, from the bias or from zero. Hierarchical matrices (inputs to coefficients,
coefficients to outputs) and state recurrences are programs of this kind. Steps are kept in groups and groups
in phases: the groups of a phase do not depend on each other.
"""

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.kernels import dispatch

__all__ = ["Program", "Segment", "Space", "Step", "block_sequence_apply", "write_program"]


class Space(IntEnum):
    """Where numbers stand: sources are of any kind, targets states or outputs."""

    INPUT = 0
    STATE = 1
    OUTPUT = 2


class Segment(NamedTuple):
    """One block and what it multiplies.

    Attributes:
        matrix: which of the flat tensors holds the block.
        start: where its first number stands.
        stride: from one of its rows to the next.
        space: where its source stands.
        offset: at which place.
        depth: its number of rows, and of numbers of the source.
    """

    matrix: int
    start: int
    stride: int
    space: Space
    offset: int
    depth: int


class Step(NamedTuple):
    """One stretch of states or outputs: the sum of its segments; the bias or zeros without any.

    Attributes:
        space: where the result goes; never twice to the same place.
        offset: at which place.
        size: how many numbers, the width of all blocks.
        segments: the parts of the sum.
        start: where among the gathered states the sum starts from, for states; None for the bias or zero.
    """

    space: Space
    offset: int
    size: int
    segments: tuple[Segment, ...]
    start: int | None = None


@dataclass(frozen=True, eq=False)
class Program:
    """A checked sequence of steps as the native code reads it; `native/block_sequence.hpp` describes it.

    Attributes:
        outputs: the length of the vectors that it gives.
        names: what the flat tensors are called where they come as a mapping.
        words: its 64-bit numbers, where nothing moves or changes them.
        code: the same as a tensor of int64, on the host wherever the weights are, for compiled graphs.
    """

    outputs: int
    names: tuple[str, ...]
    words: bytes
    code: Tensor

    @property
    def native_call(self) -> tuple[Any, ...]:
        """The product of a module that keeps the flat tensors as parameters; see `StructuredMatrix`."""
        return "block_sequence_apply", "bias", "_parameters", self.names, self.words


_HEAD = 10
# Bound once, as looking names up costs more than calling them.
_native_apply = None if dispatch.native is None else dispatch.native.block_sequence_apply
_is_compiling = torch.compiler.is_compiling


def write_program(
    inputs: int,
    outputs: int,
    states: int,
    sizes: Sequence[int],
    phases: Iterable[Sequence[Sequence[Step]]],
    *,
    gathered: Tensor | None = None,
    output_places: Tensor | None = None,
    names: Iterable[str] = (),
) -> Program:
    """Checks steps against the sizes of what they read and write, and writes them down.

    Args:
        inputs: The length of the vectors.
        outputs: The length of the results.
        states: How many numbers the steps keep in between.
        sizes: How many numbers each flat tensor holds.
        phases: Per phase the groups, per group its steps in their order.
        gathered: The input's index that stands at each of the first states from the beginning, or None.
        output_places: The position that each index of the output is taken from, or None; without them steps
            cannot read outputs, which have their bias from the start.
        names: What the flat tensors are called where they come as a mapping.

    Returns:
        The program.

    Raises:
        ValueError: A step reads or writes outside of its arrays, or an order does not fit.
    """
    extents = {Space.INPUT: inputs, Space.STATE: states, Space.OUTPUT: outputs}
    # Which outputs are there to be read: those of earlier phases, before the bias is added to them.
    readable_outputs = [False] * outputs
    sources = [] if gathered is None else gathered.tolist()
    if len(sources) > states or not all(0 <= source < inputs for source in sources):
        raise ValueError(f"at most {states} indices below {inputs} can be gathered, got {len(sources)}")
    body: list[int] = []
    phase_count = multiply_adds = 0
    for groups in phases:
        phase_count += 1
        given: list[Step] = []
        body.append(len(groups))
        for steps in groups:
            place = len(body)
            body += [0, len(steps)]
            work = 0
            for step in steps:
                first = len(sources) if step.space is Space.STATE else 0
                inside = step.size > 0 and first <= step.offset <= extents[step.space] - step.size
                if step.space is Space.INPUT or not inside:
                    raise ValueError(f"a step writes outside of its array: {step}")
                start = -1 if step.start is None else step.start
                if start != -1 and (
                    step.space is not Space.STATE or not 0 <= start <= len(sources) - step.size
                ):
                    raise ValueError(f"a step starts from what is not gathered: {step}")
                body += [step.space, step.offset, step.size, start, len(step.segments)]
                for segment in step.segments:
                    matrix, start, stride, space, offset, depth = segment
                    last = start + (depth - 1) * stride + step.size
                    readable = 0 <= offset <= extents[space] - depth
                    if space is Space.OUTPUT:
                        readable = readable and all(readable_outputs[offset : offset + depth])
                    if depth < 1 or start < 0 or stride < 0 or last > sizes[matrix] or not readable:
                        raise ValueError(f"a step reads outside of its arrays: {segment} of {step}")
                    body += segment
                    work += depth * step.size
            body[place] = work
            multiply_adds += work
            given += steps
        for step in given:
            if step.space is Space.OUTPUT and output_places is not None:
                readable_outputs[step.offset : step.offset + step.size] = [True] * step.size
    words = [inputs, outputs, states, phase_count, len(sources), 0, 0, multiply_adds, len(sizes), 0, *body]
    words[9] = len(words)
    words += sizes
    words[5] = len(words)
    words += sources
    if output_places is not None:
        places = output_places.tolist()
        if len(places) != outputs or not all(0 <= place < outputs for place in places):
            raise ValueError(f"places must be {outputs} indices below {outputs}, got {len(places)}")
        words[6] = len(words)
        words += places
    numbers = array("q", words)
    code = torch.frombuffer(numbers, dtype=torch.int64)
    return Program(outputs, tuple(names), numbers.tobytes(), code)


Composed = Callable[[Tensor, Tensor | None], Tensor]
# In their order, or under the program's names as a module keeps its parameters.
Matrices = Sequence[Tensor] | dict[str, Any]


def block_sequence_apply(
    x: Tensor, matrices: Matrices, program: Program, bias: Tensor | None, composed: Composed
) -> Tensor:
    """Applies a matrix of blocks to a batch of vectors.

    Args:
        x: The vectors, shape (*batch, inputs).
        matrices: The flat tensors in their order, or a mapping, of more perhaps, by the program's names.
        program: The steps.
        bias: Shape (outputs,), or None.
        composed: The same product of PyTorch's operations, (x, bias) to the result: for gradients, other
            devices and dtypes, and where there is no native code or a name is not in the mapping.

    Returns:
        The products, shape (*batch, outputs).
    """
    if not _is_compiling():
        # What does not fit together raises in the composition.
        y = None
        if _native_apply is not None:
            y = _native_apply(x, bias, matrices, program.names, program.words)
        return composed(x, bias) if y is None else y
    if dispatch.calls_operation(x):
        flat = _in_order(matrices, program.names)
        if flat is not None and dispatch.operation_runs_natively(x, *flat, bias):
            return _operation(x, flat, program.code, bias, program.outputs)
    return composed(x, bias)


def _in_order(matrices: Matrices, names: tuple[str, ...]) -> list[Tensor] | None:
    """The flat tensors; None where a parametrisation computes one of them."""
    if not isinstance(matrices, dict):
        return list(matrices)
    return [matrices[name] for name in names] if all(name in matrices for name in names) else None


# The same program in PyTorch's operations: the operation's fallback and backward, and the tests' oracle.


def reference(x: Tensor, matrices: Sequence[Tensor], code: Tensor, bias: Tensor | None) -> Tensor:
    """Runs a program step by step, in any floating dtype.

    Args:
        x: The vectors, shape (*batch, inputs).
        matrices: The flat tensors.
        code: The program's numbers.
        bias: Shape (outputs,), or None.

    Returns:
        The products, shape (*batch, outputs).
    """
    words = code.tolist()
    vectors = _forward(x, matrices, code, words)
    y = vectors[Space.OUTPUT]
    if words[6]:
        y = y[:, code[words[6] : words[6] + words[1]]]
    y = y if bias is None else y + bias
    return y.reshape(*x.shape[:-1], words[1])


def gradients(
    gradient: Tensor, x: Tensor, matrices: Sequence[Tensor], code: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The derivatives of a program's result, step by step backwards.

    For target = source @ block, with g the derivative by the target: ∂source = g blockᵀ, ∂block = sourceᵀ g.

    Args:
        gradient: The derivative by the result, shape (*batch, outputs).
        x: The vectors, shape (*batch, inputs).
        matrices: The flat tensors.
        code: The program's numbers.

    Returns:
        The derivatives by x and by each flat tensor.
    """
    words = code.tolist()
    vectors = _forward(x, matrices, code, words)
    derivatives = {space: torch.zeros_like(values) for space, values in vectors.items()}
    rows = gradient.reshape(-1, words[1])
    if words[6]:
        derivatives[Space.OUTPUT].index_add_(1, code[words[6] : words[6] + words[1]], rows)
    else:
        derivatives[Space.OUTPUT] = rows.clone()  # later steps may have read what earlier ones gave
    by_matrix = [torch.zeros_like(matrix, memory_format=torch.contiguous_format) for matrix in matrices]
    for step in reversed(list(_steps(words))):
        target = derivatives[step.space][:, step.offset : step.offset + step.size]
        if step.start is not None:
            derivatives[Space.STATE][:, step.start : step.start + step.size] += target
        for segment in step.segments:
            source = slice(segment.offset, segment.offset + segment.depth)
            block, slot = (_block(flat[segment.matrix], segment, step.size) for flat in (matrices, by_matrix))
            slot += vectors[segment.space][:, source].T @ target
            derivatives[segment.space][:, source] += target @ block.T
    by_x = derivatives[Space.INPUT].index_add_(
        1, _sources(code, words), derivatives[Space.STATE][:, : words[4]]
    )
    return by_x.reshape(x.shape), by_matrix


def _sources(code: Tensor, words: list[int]) -> Tensor:
    """The indices of the gathered inputs."""
    return code[words[5] : words[5] + words[4]]


def _forward(x: Tensor, matrices: Sequence[Tensor], code: Tensor, words: list[int]) -> dict[Space, Tensor]:
    """All vectors after the last step, shape (batch, size) each."""
    rows = x.reshape(-1, words[0])
    vectors = {
        Space.INPUT: rows,
        Space.STATE: rows.new_zeros(rows.shape[0], words[2]),
        Space.OUTPUT: rows.new_zeros(rows.shape[0], words[1]),
    }
    vectors[Space.STATE][:, : words[4]] = rows[:, _sources(code, words).to(rows.device)]
    for step in _steps(words):
        target = vectors[step.space][:, step.offset : step.offset + step.size]
        if step.start is not None:
            target += vectors[Space.STATE][:, step.start : step.start + step.size]
        for segment in step.segments:
            source = vectors[segment.space][:, segment.offset : segment.offset + segment.depth]
            target += source @ _block(matrices[segment.matrix], segment, step.size)
    return vectors


def _steps(words: list[int]) -> Iterator[Step]:
    """The steps of a program, read back from its numbers."""
    numbers = iter(words[_HEAD:])

    def take(count: int) -> list[int]:
        return list(itertools.islice(numbers, count))

    for _ in range(words[3]):
        for _ in range(next(numbers)):
            _, steps = take(2)
            for _ in range(steps):
                space, offset, size, origin, count = take(5)
                segments = []
                for _ in range(count):
                    matrix, start, stride, source, place, depth = take(6)
                    segments.append(Segment(matrix, start, stride, Space(source), place, depth))
                yield Step(Space(space), offset, size, tuple(segments), None if origin < 0 else origin)


def _block(flat: Tensor, segment: Segment, size: int) -> Tensor:
    """A segment's block as a view of its tensor, shape (count, size)."""
    return flat.reshape(-1).as_strided(
        (segment.depth, size), (segment.stride, 1), flat.storage_offset() + segment.start
    )


# The operations that compiled graphs hold.

_library = torch.library.Library("weft", "FRAGMENT")
_library.define(
    "block_sequence_apply(Tensor x, Tensor[] matrices, Tensor code, Tensor? bias, int outputs) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "block_sequence_gradients(Tensor gradient, Tensor x, Tensor[] matrices, Tensor code) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
_operation = torch.ops.weft.block_sequence_apply.default


def _on_host(
    x: Tensor, matrices: Sequence[Tensor], code: Tensor, bias: Tensor | None, outputs: int
) -> Tensor:
    # Only block_sequence_apply calls the operation, with a program's own code.
    y = None if _native_apply is None else _native_apply(x, bias, list(matrices), (), code)
    # As `_fake` promises: a compiled graph views the result without looking again.
    return reference(x, matrices, code, bias).contiguous() if y is None else y


_library.impl("block_sequence_apply", _on_host, "CompositeExplicitAutograd")


def _fake(x: Tensor, matrices: Sequence[Tensor], code: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


torch.library.register_fake("weft::block_sequence_apply", _fake, lib=_library)


def _gradients_on_host(gradient: Tensor, x: Tensor, matrices: Sequence[Tensor], code: Tensor) -> list[Tensor]:
    by_x, by_matrix = gradients(gradient, x, matrices, code)
    return [by_x.contiguous(), *by_matrix]


_library.impl("block_sequence_gradients", _gradients_on_host, "CompositeExplicitAutograd")


def _fake_gradients(gradient: Tensor, x: Tensor, matrices: Sequence[Tensor], code: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape), *(matrix.new_empty(matrix.shape) for matrix in matrices)]


torch.library.register_fake("weft::block_sequence_gradients", _fake_gradients, lib=_library)


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    x, matrices, code, bias, _ = inputs
    ctx.save_for_backward(x, code, *matrices)
    ctx.has_bias = bias is not None


def _backward(ctx, gradient: Tensor):
    x, code, *matrices = ctx.saved_tensors
    by_x, *by_matrix = torch.ops.weft.block_sequence_gradients(gradient, x, matrices, code)
    by_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.has_bias else None
    return by_x, by_matrix, None, by_bias, None


torch.library.register_autograd(
    "weft::block_sequence_apply", _backward, setup_context=_remember, lib=_library
)


def _refuse(ctx, *derivatives):
    raise NotImplementedError("block_sequence_apply has no second derivative; differentiate the reference")


torch.library.register_autograd("weft::block_sequence_gradients", _refuse, lib=_library)
