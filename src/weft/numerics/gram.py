"""Gram matrices as metrics: the second moment of what flows through a layer.

A fit is nearest in ‖H^{1/2}(W − Ŵ)Ĝ^{1/2}‖_F, where G = E[x xᵀ] is the input Gram, H the output Gram, and

    Ĝ = G + shrinkage · mean(diag G) · I

damps the noise of few samples. A `Gram` holds G and the ridge, and every method below acts with Ĝ, so that no
family ever sees the raw moment. Three kinds cover all layers: dense; block-diagonal (grouped convolutions,
where group i owns the i-th part of the weight's rows); diagonal (embeddings and inputs too wide for a square
matrix).
"""

import copy
import hashlib
import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from weft import checks

DEFAULT_SHRINKAGE = 0.1
# In error feedback over rows: blocks of at least so many rows, and at most so many blocks, go together.
_LEAST_ROW_BLOCK, _ROW_BLOCKS = 16, 32
# Below this ratio of the least to the largest pivot, Cholesky's factor is noise and eigenvalues are floored
# instead.
_SINGULAR = 1e-13
# How many entries of a large moment are converted at a time.
_NUMBERS_AT_A_TIME = 2**24


@contextmanager
def full_precision() -> Generator[None, None, None]:
    """Computes in the dtypes that tensors have: a caller's autocast is for networks, not for sums and fits.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator()
            if device is not None:
                stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


class Gram(ABC):
    """A positive semidefinite metric on row vectors of length `size`, shrunk towards the identity.

    All methods take and return tensors in the caller's dtype; roots are computed in float64.
    """

    moment: Tensor
    ridge: float
    file: "MomentFile | None" = None  # what the moment is a mapping of, where it is too large for memory

    @property
    @abstractmethod
    def size(self) -> int:
        """The length of the vectors that the metric measures."""

    @abstractmethod
    def matmul(self, matrix: Tensor) -> Tensor:
        """Multiplies rows by the metric: M Ĝ, (rows, size) -> (rows, size)."""

    @abstractmethod
    def whiten(self, matrix: Tensor) -> Tensor:
        """Multiplies rows by the root: M R with R Rᵀ = Ĝ, (rows, size) -> (rows, size)."""

    @abstractmethod
    def unwhiten(self, matrix: Tensor) -> Tensor:
        """Undoes `whiten`: M R⁻¹, (rows, size) -> (rows, size)."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """The diagonal of Ĝ, averaged over blocks, float64, shape (size,)."""

    @abstractmethod
    def average(self) -> "Gram":
        """The same metric for every row: the mean over blocks; the Gram itself where it has no blocks."""

    @abstractmethod
    def restrict(self, indices: Tensor) -> "Gram":
        """The metric on a subset of the coordinates, shape (size,) -> (len(indices),); the ridge stays."""

    def normalized(self) -> Self:
        """The same metric in the unit in which its mean diagonal is 1."""
        size = float(self.diagonal().mean())
        scaled = copy.copy(self)  # without roots
        scaled.moment, scaled.ridge, scaled.file = self.moment / size, self.ridge / size, None
        return scaled

    def squared_norm(self, matrix: Tensor) -> Tensor:
        """The squared metric norm tr(M Ĝ Mᵀ) as a scalar tensor."""
        return (self.matmul(matrix) * matrix).sum()

    def dense(self) -> Tensor:
        """Ĝ as a float64 matrix of shape (size, size); blocks are averaged."""
        return self.average().matmul(torch.eye(self.size, dtype=torch.float64, device=self.moment.device))

    def root(self) -> Tensor:
        """A root R of Ĝ with R Rᵀ = Ĝ, float64, shape (size, size); blocks are averaged."""
        return self.average().whiten(torch.eye(self.size, dtype=torch.float64, device=self.moment.device))

    def release(self) -> None:
        """Drops roots that were kept for the next call: they take twice the memory of the moment itself."""
        vars(self).pop("_roots", None)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in {"_roots", "file"}}
        if self.file is None:
            return {**state, "moment": alone(self.moment)}
        return {**state, "moment": (self.file.path, tuple(self.moment.shape))}  # another process maps it too

    def __setstate__(self, state: dict[str, Any]) -> None:
        moment = state["moment"]
        vars(self).update(state, moment=moment if isinstance(moment, Tensor) else mapped(*moment))

    def digest(self) -> str:
        """A hash of the contents, for caches."""
        content = hashlib.sha256(type(self).__name__.encode())
        content.update(repr(self.ridge).encode())
        content.update(self.moment.contiguous().cpu().numpy().data)
        return content.hexdigest()


class MomentFile:
    """A file that holds a moment, removed when no Gram needs it any more.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        weakref.finalize(self, path.unlink, missing_ok=True)


def mapped(path: Path, shape: Sequence[int]) -> Tensor:
    """A float64 tensor whose memory is a file's, shared with all who map it.

    Args:
        path: the file; where it does not exist, it becomes one of zeros, which takes no room at first.
        shape: the tensor's.

    Returns:
        The tensor.
    """
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.float64).reshape(shape)


def add_products(total: Tensor, vectors: Tensor) -> None:
    """Adds the second moment of vectors, a few rows of it at a time: it is never there twice.

    Args:
        total: the sum so far, float64 on the CPU, shape (groups, size, size), changed in place.
        vectors: shape (groups, count, size).
    """
    rows = max(1, _NUMBERS_AT_A_TIME // vectors.shape[2])
    for first in range(0, vectors.shape[2], rows):
        part = vectors[:, :, first : first + rows].mT @ vectors
        total[:, first : first + rows] += part.to(device="cpu", dtype=torch.float64)


def alone(tensor: Tensor) -> Tensor:
    """A tensor on the CPU without others in its memory: pickling a part of something writes all of it.

    Args:
        tensor: any.

    Returns:
        The tensor itself where that is so already, detached.
    """
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _ridge(diagonal: Tensor, shrinkage: float) -> float:
    """The absolute ridge; a layer that never saw a signal gets the plain Frobenius norm."""
    mean = float(diagonal.mean())
    return shrinkage * mean if mean > 0 else 1.0


def _check_moment(moment: Tensor, shrinkage: float) -> Tensor:
    checks.finite("moment", moment)
    if not shrinkage >= 0:
        raise ValueError(checks.fault("shrinkage", "at least 0", shrinkage, "use the default 0.1"))
    return moment.detach().to(torch.float64)


def _root(metric: Tensor) -> tuple[Tensor, Tensor]:
    """R and R⁻¹ of a positive semidefinite matrix; a singular one has its eigenvalues floored."""
    factor, fails = torch.linalg.cholesky_ex(metric)
    pivots = factor.diagonal().square()
    if not fails and bool(pivots.min() > _SINGULAR * pivots.max()):
        identity = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
        return factor, torch.linalg.solve_triangular(factor, identity, upper=False)
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(_SINGULAR * values.max().clamp_min(torch.finfo(values.dtype).tiny))
    return vectors * values.sqrt(), vectors.T / values.sqrt()[:, None]


def inverse_root(metric: Tensor) -> Tensor:
    """Upper triangular U with UᵀU = Ĝ⁻¹; a singular metric gets the ridge that makes it invertible.

    Args:
        metric: Ĝ, shape (size, size).

    Returns:
        U, of the same shape and dtype.
    """
    size, ridge = float(metric.diagonal().mean()) or 1.0, 0.0
    identity = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    while True:
        # Of the mirrored metric's lower factor: Ĝ = U⁻¹U⁻ᵀ with U⁻¹ upper triangular.
        factor, fails = torch.linalg.cholesky_ex((metric + ridge * size * identity).flip(0, 1))
        if not fails and bool(factor.diagonal().min() > 1e-7 * math.sqrt(size)):
            return torch.linalg.solve_triangular(factor.flip(0, 1), identity, upper=True)
        ridge = max(10 * ridge, 1e-9)


class DenseGram(Gram):
    """A full second moment.

    Args:
        moment: G = E[x xᵀ], shape (size, size).
        shrinkage: the ridge in units of the mean diagonal.

    Raises:
        ValueError: the moment is not square or not finite, or the shrinkage is negative.

    Examples:
        >>> gram = DenseGram(torch.eye(2), shrinkage=0.5)
        >>> gram.matmul(torch.ones(1, 2))
        tensor([[1.5000, 1.5000]])
    """

    def __init__(self, moment: Tensor, shrinkage: float = DEFAULT_SHRINKAGE) -> None:
        moment = _check_moment(moment, shrinkage)
        if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
            expected = "a square matrix"
            raise ValueError(checks.fault("moment", expected, tuple(moment.shape), "pass E[x xᵀ]"))
        self.moment = moment
        self.ridge = _ridge(moment.diagonal(), shrinkage)

    @property
    def size(self) -> int:
        return len(self.moment)

    @cached_property
    def _roots(self) -> tuple[Tensor, Tensor]:
        metric = self.moment.clone()
        metric.diagonal().add_(self.ridge)
        return _root(metric)

    def matmul(self, matrix: Tensor) -> Tensor:
        parts = self.moment.split(max(1, _NUMBERS_AT_A_TIME // self.size), dim=1)
        return torch.cat([matrix @ part.to(matrix) for part in parts], dim=-1) + self.ridge * matrix

    def whiten(self, matrix: Tensor) -> Tensor:
        return matrix @ self._roots[0].to(matrix)

    def unwhiten(self, matrix: Tensor) -> Tensor:
        return matrix @ self._roots[1].to(matrix)

    def diagonal(self) -> Tensor:
        return self.moment.diagonal() + self.ridge

    def average(self) -> "DenseGram":
        return self

    def restrict(self, indices: Tensor) -> "DenseGram":
        part = DenseGram(self.moment[indices][:, indices])
        part.ridge = self.ridge
        return part


class BlockDiagonalGram(Gram):
    """One second moment per group of a grouped convolution.

    The weight's rows are divided into as many equal parts as there are blocks; part i is measured by block i.

    Args:
        moment: the blocks, shape (groups, size, size).
        shrinkage: the ridge in units of the mean diagonal over all blocks.

    Raises:
        ValueError: the blocks are not square or not finite, or the shrinkage is negative.
    """

    def __init__(self, moment: Tensor, shrinkage: float = DEFAULT_SHRINKAGE) -> None:
        moment = _check_moment(moment, shrinkage)
        if moment.ndim != 3 or moment.shape[1] != moment.shape[2]:
            expected = "of shape (groups, size, size)"
            raise ValueError(
                checks.fault("moment", expected, tuple(moment.shape), "stack the groups' moments")
            )
        self.moment = moment
        self.ridge = _ridge(moment.diagonal(dim1=1, dim2=2), shrinkage)

    @property
    def groups(self) -> int:
        """The number of blocks."""
        return len(self.moment)

    @property
    def size(self) -> int:
        return self.moment.shape[1]

    def block(self, index: int) -> DenseGram:
        """The metric of one group's rows."""
        own = DenseGram(self.moment[index])
        own.ridge = self.ridge
        return own

    @cached_property
    def _roots(self) -> tuple[Tensor, Tensor]:
        identity = torch.eye(self.size, dtype=self.moment.dtype, device=self.moment.device)
        pairs = [_root(block + self.ridge * identity) for block in self.moment]
        return torch.stack([root for root, _ in pairs]), torch.stack([inverse for _, inverse in pairs])

    def _by_block(self, matrix: Tensor, blocks: Tensor) -> Tensor:
        parts = matrix.reshape(self.groups, -1, self.size)
        return (parts @ blocks.to(matrix)).reshape(matrix.shape)

    def matmul(self, matrix: Tensor) -> Tensor:
        return self._by_block(matrix, self.moment) + self.ridge * matrix

    def whiten(self, matrix: Tensor) -> Tensor:
        return self._by_block(matrix, self._roots[0])

    def unwhiten(self, matrix: Tensor) -> Tensor:
        return self._by_block(matrix, self._roots[1])

    def diagonal(self) -> Tensor:
        return self.moment.diagonal(dim1=1, dim2=2).mean(0) + self.ridge

    def average(self) -> DenseGram:
        mean = DenseGram(self.moment.mean(0))
        mean.ridge = self.ridge
        return mean

    def restrict(self, indices: Tensor) -> "BlockDiagonalGram":
        part = BlockDiagonalGram(self.moment[:, indices][:, :, indices])
        part.ridge = self.ridge
        return part


class DiagonalGram(Gram):
    """A diagonal second moment, for inputs too wide for a square matrix and for embeddings.

    Args:
        moment: E[x²] per coordinate, shape (size,).
        shrinkage: the ridge in units of the mean.

    Raises:
        ValueError: the moment is not a finite vector, or the shrinkage is negative.
    """

    def __init__(self, moment: Tensor, shrinkage: float = DEFAULT_SHRINKAGE) -> None:
        moment = _check_moment(moment, shrinkage)
        if moment.ndim != 1:
            raise ValueError(checks.fault("moment", "a vector", tuple(moment.shape), "pass E[x²] per input"))
        self.moment = moment
        self.ridge = _ridge(moment, shrinkage)

    @property
    def size(self) -> int:
        return len(self.moment)

    def matmul(self, matrix: Tensor) -> Tensor:
        return matrix * self.diagonal().to(matrix)

    def whiten(self, matrix: Tensor) -> Tensor:
        return matrix * self.diagonal().sqrt().to(matrix)

    def unwhiten(self, matrix: Tensor) -> Tensor:
        scale = self.diagonal()
        floor = _SINGULAR * float(scale.max())
        return matrix / scale.clamp_min(floor).sqrt().to(matrix)

    def diagonal(self) -> Tensor:
        return self.moment + self.ridge

    def average(self) -> "DiagonalGram":
        return self

    def restrict(self, indices: Tensor) -> "DiagonalGram":
        part = DiagonalGram(self.moment[indices])
        part.ridge = self.ridge
        return part


def squared_error(error: Tensor, input_gram: Gram | None = None, output_gram: Gram | None = None) -> Tensor:
    """The squared error ‖H^{1/2} E Ĝ^{1/2}‖²_F = tr(H E Ĝ Eᵀ).

    Args:
        error: E = W − Ŵ, shape (outputs, inputs).
        input_gram: Ĝ; the identity where None.
        output_gram: H; the identity where None.

    Returns:
        A scalar tensor.
    """
    right = error if input_gram is None else input_gram.matmul(error)
    left = error if output_gram is None else output_gram.matmul(error.T).T
    return (left * right).sum()


def row_sizes(matrix: Tensor, input_gram: Gram | None = None) -> Tensor:
    """The squared norm of every row in a metric.

    Args:
        matrix: shape (rows, columns).
        input_gram: the metric; the identity where None.

    Returns:
        Float64, shape (rows,).
    """
    weighed = matrix if input_gram is None else input_gram.matmul(matrix)
    return (weighed * matrix).sum(1).double().clamp_min_(0)


# ------------------------------------------------------------------------------------------------------------
# Error feedback over rows: a row's target takes up what the rows before it have lost


def row_root(output_gram: Gram) -> Tensor:
    """R upper triangular with R Rᵀ = H.

    Args:
        output_gram: H.

    Returns:
        Float64, shape (size, size).
    """
    inverse = inverse_root(output_gram.dense())
    identity = torch.eye(len(inverse), dtype=inverse.dtype, device=inverse.device)
    return torch.linalg.solve_triangular(inverse, identity, upper=True)


def row_blocks(rows: int) -> Sequence[Tensor]:
    """Runs of rows that go together in error feedback over rows.

    Args:
        rows: how many there are.

    Returns:
        Row numbers, run by run.
    """
    return torch.arange(rows).split(max(_LEAST_ROW_BLOCK, -(-rows // _ROW_BLOCKS)))


def row_weights(output_gram: Gram | None, rows: int) -> Tensor:
    """By what a row's error counts once the rows after it have taken up what they can of it.

    Args:
        output_gram: H; the identity where None.
        rows: how many rows there are.

    Returns:
        Ω_i such that Σ Ω_i ‖e_i‖² is about the error after error feedback over rows; H_ii where these are
        apart.
    """
    if output_gram is None:
        return torch.ones(rows, dtype=torch.float64)
    if isinstance(output_gram, DiagonalGram):
        return output_gram.diagonal()
    root = row_root(output_gram)
    return torch.cat([root[own[0] : own[-1] + 1][:, own].square().sum(1) for own in row_blocks(rows)])
