"""A chain of sparse matrices applied to a batch of vectors: y = x (S₁ S₂ … S_Q)ᵀ + b."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Self
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from weft import checks
from weft.kernels import dispatch

__all__ = ["SparseChain", "SparseSupport", "apply_factor", "sparse_chain_apply"]

Size = tuple[int, int]

# Bound once, as looking names up costs more than calling them.
_native_apply: Any = None if dispatch.native is None else dispatch.native.sparse_chain_apply
_get_num_threads = torch.get_num_threads
_is_compiling = torch.compiler.is_compiling


# ----------------------------------------------------------------------------------------------------
# Supports


class SparseSupport(NamedTuple):
    """Where one sparse matrix S has its entries, by rows for S and by columns for Sᵀ.

    All tensors are of int32, of int64 where that is too small, on one device.

    Attributes:
        size: rows and columns of S.
        columns: of every entry, row after row.
        starts: of every row, the number of its first entry.
        rows: of every entry.
        order: the numbers of the entries, column after column.
        transposed_rows: `rows[order]`.
        transposed_starts: of every column, its first place in `order`.
    """

    size: Size
    columns: Tensor
    starts: Tensor
    rows: Tensor
    order: Tensor
    transposed_rows: Tensor
    transposed_starts: Tensor

    @classmethod
    def of(cls, size: Size, counts: Tensor, columns: Tensor) -> Self:
        """A support from what has to be stored of it.

        Args:
            size: rows and columns of S.
            counts: the number of entries in every row, whole numbers of shape (rows,).
            columns: the column of every entry, row after row, whole numbers of shape (entries,).

        Returns:
            The support, on the device of `columns`.

        Raises:
            ValueError: there are not as many columns as entries, or one is outside the matrix.
        """
        remedy = "load the file that belongs to this model"
        checks.shape("counts", counts.shape, (size[0],), remedy)
        counts, columns = counts.to(torch.int64), columns.to(torch.int64)
        if counts.numel() and int(counts.min()) < 0:
            raise ValueError(checks.fault("counts", "at least 0", int(counts.min()), remedy))
        checks.shape("columns", columns.shape, (int(counts.sum()),), remedy)
        if columns.numel() and int(columns.max()) >= size[1]:
            raise ValueError(checks.fault("columns", f"below {size[1]}", int(columns.max()), remedy))
        if columns.numel() and int(columns.min()) < 0:
            raise ValueError(checks.fault("columns", "at least 0", int(columns.min()), remedy))
        rows = torch.repeat_interleave(torch.arange(size[0], device=counts.device), counts)
        order = torch.argsort(columns, stable=True)
        per_column = torch.bincount(columns, minlength=size[1])
        fits = max(*size, columns.numel()) < 1 << 31
        dtype = torch.int32 if fits else torch.int64
        return cls(
            size,
            columns.to(dtype),
            (counts.cumsum(0) - counts).to(dtype),
            rows.to(dtype),
            order.to(dtype),
            rows[order].to(dtype),
            (per_column.cumsum(0) - per_column).to(dtype),
        )

    def transposed(self) -> "SparseSupport":
        """The support of Sᵀ, whose values are those of S in `order`."""
        inverse = torch.empty_like(self.order)
        numbers = torch.arange(self.order.shape[0], dtype=inverse.dtype, device=inverse.device)
        inverse[self.order] = numbers
        size = (self.size[1], self.size[0])
        by_column = (self.transposed_rows, self.transposed_starts, self.columns[self.order])
        return SparseSupport(size, *by_column, inverse, self.columns, self.starts)


_PARTS = SparseSupport._fields[1:]


class SparseChain(nn.Module):
    """The supports of S₁, S₂, …, S_Q for `sparse_chain_apply`; one matrix is a chain of one.

    A module without parameters, to be a submodule of whatever holds the values: its tensors are buffers that
    are not stored and move with the module. The native code does not read them, but a copy of its own with
    16-bit columns where they fit, which is made and checked at the first native call and never handed out: no
    later change of a tensor can lead it outside of its memory. A chain does not change; a new support is a
    new chain.

    Args:
        sizes: rows and columns of every matrix, from left to right: (m, a), (a, b), …, (z, n).
        counts: the number of entries in every row, one matrix after the other, shape (total rows,).
        columns: the column of every entry, row after row and matrix after matrix, shape (entries,).

    Raises:
        ValueError: the sizes do not form a chain, or counts and columns do not fit to them.

    Attributes:
        sizes: rows and columns of every matrix.
        entries: the number of entries of every matrix.

    Examples:
        >>> eye = SparseChain([(2, 3)], torch.tensor([1, 1]), torch.tensor([0, 2]))
        >>> sparse_chain_apply(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 10.0]), eye)
        tensor([ 1., 30.])
    """

    def __init__(self, sizes: Sequence[Size], counts: Tensor, columns: Tensor) -> None:
        super().__init__()
        remedy = "give every matrix as many columns as the next one has rows"
        joined = all(left[1] == right[0] for left, right in itertools.pairwise(sizes))
        if not (sizes and joined and all(min(size) >= 1 for size in sizes)):
            raise ValueError(checks.fault("sizes", "those of a chain", list(sizes), remedy))
        self.sizes = [(int(rows), int(columns)) for rows, columns in sizes]
        self.outputs, self.inputs = self.sizes[0][0], self.sizes[-1][1]
        remedy = "load the file that belongs to this model"
        checks.shape("counts", counts.shape, (sum(rows for rows, _ in self.sizes),), remedy)
        row_lists = counts.split([rows for rows, _ in self.sizes])
        self.entries = [int(row_counts.sum()) for row_counts in row_lists]
        checks.shape("columns", columns.shape, (sum(self.entries),), remedy)
        lists = zip(self.sizes, row_lists, columns.split(self.entries), strict=True)
        for index, (size, row_counts, row_columns) in enumerate(lists):
            support = SparseSupport.of(size, row_counts, row_columns)
            for name in _PARTS:
                self.register_buffer(f"{name}_{index}", getattr(support, name), persistent=False)
        self._packed: _Packed | None = None

    def support(self, index: int) -> SparseSupport:
        """The support of one matrix, on the device where the module is.

        Args:
            index: of the matrix, from the left.

        Returns:
            The support.
        """
        return SparseSupport(self.sizes[index], *(getattr(self, f"{name}_{index}") for name in _PARTS))

    def supports(self) -> list[SparseSupport]:
        """The supports of all matrices, from left to right."""
        return [self.support(index) for index in range(len(self.sizes))]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}


# ----------------------------------------------------------------------------------------------------
# The product


def sparse_chain_apply(x: Tensor, values: Tensor, chain: SparseChain, bias: Tensor | None = None) -> Tensor:
    """Apply a product of sparse matrices to a batch of vectors: y = x (S₁ S₂ … S_Q)ᵀ + b.

    Args:
        x: The vectors, shape (*batch, inputs).
        values: The values of all entries, row after row and S₁ first; any shape of as many numbers.
        chain: Where the entries are.
        bias: b, shape (outputs,), or None.

    Returns:
        The products in the dtype of `x`, shape (*batch, outputs); half precisions are added up in single
        precision.
    """
    if _native_apply is not None and not _is_compiling():
        packed = chain._packed
        if packed is None and dispatch.takes_raw_pointers(x, values, bias):
            packed = chain._packed = _Packed([_PackedSupport(support) for support in chain.supports()])
        y = None if packed is None else _apply_in_memory(x, values, packed, bias)
        if y is not None:
            return y
    supports = chain.supports()
    if dispatch.calls_operation(x):
        sizes = [side for size in chain.sizes for side in size]
        tensors = [getattr(support, name) for support in supports for name in _PARTS]
        return _operation(x, values, tensors, sizes, bias)
    return reference(x, values, supports, bias)


def reference(
    x: Tensor, values: Tensor, supports: Sequence[SparseSupport], bias: Tensor | None = None
) -> Tensor:
    """The same product by PyTorch's own operations, on any device and dtype, with every gradient."""
    inputs, outputs = supports[-1].size[1], supports[0].size[0]
    checks.last_dimension(x, inputs)
    dtype = x.dtype if x.dtype in {torch.float32, torch.float64} else torch.float32
    hidden = x.reshape(-1, inputs).T.to(dtype).contiguous()
    parts = values.flatten().to(dtype).split([support.columns.shape[0] for support in supports])
    for part, support in zip(reversed(parts), reversed(supports), strict=True):
        hidden = apply_factor(part, hidden, support)
    y = hidden.T if bias is None else hidden.T + bias.to(dtype)
    return y.to(x.dtype).reshape(*x.shape[:-1], outputs)


def apply_factor(values: Tensor, x: Tensor, support: SparseSupport) -> Tensor:
    """One matrix applied to a batch held with one row per coordinate: S X.

    Args:
        values: of the entries, shape (entries,).
        x: X, shape (columns, batch).
        support: where the entries are.

    Returns:
        Shape (rows, batch).
    """
    if dispatch.needs_plain_operations():
        return _gather_and_add(values, x, support)
    return _ApplyFactor.apply(values, x, *support)


def _gather_and_add(values: Tensor, x: Tensor, support: SparseSupport) -> Tensor:
    """S X of gather and scatter operations that every exporter and transform knows."""
    products = values[:, None] * x[support.columns]
    return x.new_zeros(support.size[0], x.shape[1]).index_add(0, support.rows, products)


def _sum_of_rows(values: Tensor, x: Tensor, indices: Tensor, starts: Tensor) -> Tensor:
    """The rows of X by index, weighted and added from each start to the next."""
    if x.shape[1] == 0:  # an empty batch, which embedding_bag refuses
        return x.new_zeros(starts.shape[0], 0)
    return functional.embedding_bag(indices, x, starts, mode="sum", per_sample_weights=values)


def _to_values(gradient: Tensor, x: Tensor, support: SparseSupport) -> Tensor:
    """The gradient of the values: rows of ∂Y times rows of X."""
    if x.shape[1] == 0:
        return x.new_zeros(support.columns.shape[0])
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        gradient.contiguous(), x.contiguous(), support.columns, support.starts, support.rows, 0, -1
    )


def _to_x(gradient: Tensor, values: Tensor, support: SparseSupport) -> Tensor:
    """The gradient of X: Sᵀ ∂Y."""
    return _sum_of_rows(
        values[support.order], gradient.contiguous(), support.transposed_rows, support.transposed_starts
    )


class _ApplyFactor(torch.autograd.Function):
    """S X without a copy of X per entry."""

    @staticmethod
    def forward(values, x, size, columns, starts, rows, order, transposed_rows, transposed_starts):
        return _sum_of_rows(values, x.contiguous(), columns, starts)

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, x, size, *indices = inputs
        ctx.size = size
        ctx.save_for_backward(values, x, *indices)

    @staticmethod
    def backward(ctx, *gradients):
        values, x, *indices = ctx.saved_tensors
        support = SparseSupport(ctx.size, *indices)
        to_values = _to_values(gradients[0], x, support) if ctx.needs_input_grad[0] else None
        to_x = _to_x(gradients[0], values, support) if ctx.needs_input_grad[1] else None
        return to_values, to_x, None, None, None, None, None, None, None


# ----------------------------------------------------------------------------------------------------
# The native twin


class _PackedSupport:
    """One support as the native code reads it: checked, in host memory that nothing else refers to."""

    def __init__(self, support: SparseSupport) -> None:
        rows, columns = support.size
        if columns > 1 << 31:
            expected = f"at most {1 << 31} for the native kernels"
            raise ValueError(checks.fault("columns", expected, columns, "set WEFT_KERNELS=reference"))
        narrow = columns <= 1 << 16
        entries = support.columns.numel()
        with torch.inference_mode(mode=False), torch.no_grad():
            # Checked as they were copied: what may change meanwhile elsewhere has no say.
            copied = support.columns.to("cpu", torch.int64, copy=True)
            self.columns = copied.to(torch.uint16 if narrow else torch.int32)
            self.starts = torch.cat([support.starts.to("cpu", torch.int64), torch.tensor([entries])])
        fits = not entries or (int(copied.min()) >= 0 and int(copied.max()) < columns)
        ordered = self.starts.shape == (rows + 1,) and int(self.starts[0]) == 0
        if not (fits and ordered and bool((self.starts.diff() >= 0).all())):
            remedy = "make a new SparseChain"
            raise ValueError(
                checks.fault("support", f"one of a {rows} x {columns} matrix", "another", remedy)
            )
        self.size, self.entries = support.size, entries
        self.row = [
            rows,
            columns,
            self.columns.data_ptr(),
            self.starts.data_ptr(),
            int(narrow),
        ]


class _Packed:
    """A chain as the native code reads it."""

    def __init__(self, supports: list[_PackedSupport]) -> None:
        self.supports = supports
        self.entries = sum(support.entries for support in supports)
        self.outputs, self.inputs = supports[0].size[0], supports[-1].size[1]
        self.count = len(supports)
        with torch.inference_mode(mode=False):
            self.table = torch.tensor([support.row for support in supports], dtype=torch.int64)
        self.address = self.table.data_ptr()


def _apply_in_memory(x: Tensor, values: Tensor, packed: _Packed, bias: Tensor | None) -> Tensor | None:
    """The product by the native code; None where the guard forbids it or shapes do not fit."""
    return _native_apply(
        x,
        values,
        bias,
        packed.address,
        packed.count,
        packed.entries,
        packed.inputs,
        packed.outputs,
        _get_num_threads(),
    )


# ----------------------------------------------------------------------------------------------------
# The operation that compiled graphs hold: supports come as tensors, which it packs once for each of them.

_library = torch.library.Library("weft", "FRAGMENT")
_library.define(
    "sparse_chain_apply(Tensor x, Tensor values, Tensor[] supports, int[] sizes, Tensor? bias) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_operation = torch.ops.weft.sparse_chain_apply.default


def _supports(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[SparseSupport]:
    width = len(_PARTS)
    return [
        SparseSupport((sizes[2 * index], sizes[2 * index + 1]), *tensors[index * width : (index + 1) * width])
        for index in range(len(sizes) // 2)
    ]


def _compute(
    x: Tensor, values: Tensor, supports: Sequence[Tensor], sizes: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    # Rows after each other, as `_fake` promises: a compiled graph views the result without looking again.
    return reference(x, values, _supports(supports, sizes), bias).contiguous()


# By the tensor of columns: with the tensor of starts, the state of both, and the packed support.
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _pack_once(support: SparseSupport) -> _PackedSupport:
    state = (support.size, _version(support.columns), _version(support.starts))
    kept = _kept.get(support.columns)
    if kept is not None and kept[0]() is support.starts and kept[1] == state:
        return kept[2]
    packed = _PackedSupport(support)
    _kept[support.columns] = (ref(support.starts), state, packed)
    return packed


def _on_host(
    x: Tensor, values: Tensor, supports: Sequence[Tensor], sizes: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    given = _supports(supports, sizes)
    if dispatch.takes_raw_pointers(x, values, bias):
        y = _apply_in_memory(x, values, _Packed([_pack_once(support) for support in given]), bias)
        if y is not None:
            return y
    return reference(x, values, given, bias).contiguous()


_library.impl("sparse_chain_apply", _compute, "CompositeExplicitAutograd")
_library.impl("sparse_chain_apply", _on_host, "CPU")


def _fake(
    x: Tensor, values: Tensor, supports: Sequence[Tensor], sizes: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], sizes[0])


torch.library.register_fake("weft::sparse_chain_apply", _fake, lib=_library)


def _remember(ctx, inputs, output: Tensor) -> None:
    x, values, supports, sizes, bias = inputs
    ctx.save_for_backward(x, values, *supports)
    ctx.sizes, ctx.bias_dtype = sizes, None if bias is None else bias.dtype


def _backward(ctx, gradient: Tensor):
    """With H_Q = Xᵀ, H_{q-1} = S_q H_q and G₀ = ∂Yᵀ, G_q = S_qᵀ G_{q-1}: ∂values_q from G_{q-1} and H_q."""
    x, values, *tensors = ctx.saved_tensors
    needs_x, needs_values, _, _, needs_bias = ctx.needs_input_grad
    supports = _supports(tensors, ctx.sizes)
    dtype = x.dtype if x.dtype in {torch.float32, torch.float64} else torch.float32
    rows = gradient.reshape(-1, gradient.shape[-1])
    parts = values.flatten().to(dtype).split([support.columns.shape[0] for support in supports])
    hidden = [x.reshape(-1, x.shape[-1]).T.to(dtype).contiguous()]
    if needs_values:
        for part, support in zip(reversed(parts[1:]), reversed(supports[1:]), strict=True):
            hidden.append(_sum_of_rows(part, hidden[-1], support.columns, support.starts))
    flow = rows.T.to(dtype)
    to_values = []
    for index, (part, support) in enumerate(zip(parts, supports, strict=True)):
        if needs_values:
            to_values.append(_to_values(flow, hidden[-1 - index], support))
        if needs_x or index < len(supports) - 1:
            flow = _to_x(flow, part, support)
    return (
        flow.T.to(x.dtype).reshape(x.shape) if needs_x else None,
        torch.cat(to_values).to(values.dtype).reshape(values.shape) if needs_values else None,
        [None] * len(tensors),
        None,
        rows.sum(0).to(ctx.bias_dtype) if needs_bias else None,
    )


torch.library.register_autograd("weft::sparse_chain_apply", _backward, setup_context=_remember, lib=_library)
