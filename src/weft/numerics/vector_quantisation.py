"""Vector quantisation: every piece of a row becomes a codeword, chosen in the metric of the inputs.

A matrix W (rows, columns) is cut into subspaces of equal width along its columns. Piece (i, s) is replaced by
scale_i · codeword, from the codebook of subspace s or from one that several subspaces share:

    Ŵ[i, s] = scale_i · codebooks[book(s)][code(i, s)].

In the metric Ĝ the choices of one row depend on each other. They are made with error feedback, subspace after
subspace, every error handed on to the columns still open; then by coordinate descent, each choice against all
others; and between sweeps codebooks and scales are solved for, the choices being given.
"""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from weft.numerics.gauss_newton import refine
from weft.numerics.gram import DiagonalGram, Gram, inverse_root, squared_error

__all__ = ["Codes", "cluster", "nearest", "quantise", "with_feedback"]

# Points to run k-means on: so many per codeword give all that more would.
_POINTS_PER_CODEWORD = 256
_LLOYD_ITERATIONS = 30
_NUMBERS_AT_ONCE = 1 << 24  # of distances


@dataclass(frozen=True)
class Codes:
    """A matrix of codewords.

    Attributes:
        codes: which codeword, shape (rows, subspaces), int64.
        codebooks: shape (books, codewords, width).
        scales: one per row, shape (rows,).
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    def books(self) -> Tensor:
        """Which codebook every subspace uses, shape (subspaces,)."""
        return book_of(self.codes.shape[1], len(self.codebooks)).to(self.codes.device)

    def dense(self) -> Tensor:
        """The matrix, shape (rows, subspaces · width)."""
        return synthesise(self.codes, self.codebooks, self.scales)

    def error(self, matrix: Tensor, input_gram: Gram | None, output_gram: Gram | None) -> float:
        """The squared error in the weighted norm."""
        return float(squared_error(matrix - self.dense(), input_gram, output_gram))


def book_of(subspaces: int, books: int) -> Tensor:
    """Which codebook every subspace uses: neighbours share one, all alike as far as the numbers divide.

    Args:
        subspaces: how many subspaces.
        books: how many codebooks.

    Returns:
        Shape (subspaces,), int64.
    """
    return torch.arange(subspaces) * books // subspaces


def synthesise(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """The matrix of codes, differentiable in codebooks and scales.

    Args:
        codes: shape (rows, subspaces).
        codebooks: shape (books, codewords, width).
        scales: shape (rows,).

    Returns:
        Shape (rows, subspaces · width).
    """
    books = book_of(codes.shape[1], len(codebooks)).to(codes.device)
    place = books * codebooks.shape[1] + codes
    return codebooks.flatten(0, 1)[place].flatten(1) * scales[:, None]


def cluster(points: Tensor, count: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
    """k-means: k-means++ for the first centres, then Lloyd's iterations (scikit-learn's).

    Args:
        points: shape (points, width), floating.
        count: how many centres; where there are fewer distinct points, centres repeat.
        weights: of the points, shape (points,); equal where None.
        seed: of the drawing.

    Returns:
        The centres, shape (count, width), in the points' dtype.

    Source: Lloyd 1982; Arthur and Vassilvitskii 2007.
    """
    data = points.detach().cpu().double().numpy()
    mass = None if weights is None else weights.detach().cpu().double().numpy()
    if mass is not None and not mass.sum() > 0:
        mass = None
    limit = _POINTS_PER_CODEWORD * count
    if len(data) > limit:
        chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:limit].numpy()
        data, mass = data[chosen], None if mass is None else mass[chosen]
    if count >= len(data):
        centres = torch.from_numpy(data)[torch.arange(count) % len(data)]
        return centres.to(points)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than centres
        first, _ = kmeans_plusplus(data, count, sample_weight=mass, random_state=seed)
        options: dict[str, Any] = {"init": first, "n_init": 1, "max_iter": _LLOYD_ITERATIONS}
        model = KMeans(count, random_state=seed, **options)
        model.fit(data, sample_weight=mass)
    return torch.from_numpy(model.cluster_centers_).to(points)


def nearest(points: Tensor, codebook: Tensor) -> Tensor:
    """The nearest codeword of every point, in the Euclidean norm.

    Args:
        points: shape (points, width).
        codebook: shape (codewords, width).

    Returns:
        Shape (points,), int64.
    """
    offset = codebook.square().sum(1)
    pieces = points.split(max(1, _NUMBERS_AT_ONCE // len(codebook)))
    return torch.cat([torch.addmm(offset, piece, codebook.T, alpha=-2).argmin(1) for piece in pieces])


def quantise(
    matrix: Tensor,
    subspaces: int,
    codewords: int,
    books: int,
    *,
    scaled: bool,
    input_gram: Gram | None = None,
    output_gram: Gram | None = None,
    start: Codes | None = None,
    sweeps: int = 8,
    tolerance: float = 3e-3,
    seed: int = 0,
) -> Codes:
    """Codes near a matrix in the weighted norm.

    Args:
        matrix: W, shape (rows, columns), float32 or float64.
        subspaces: into how many pieces a row is cut; divides the columns.
        codewords: how many per codebook.
        books: how many codebooks, from 1 (shared by all subspaces) to `subspaces`.
        scaled: whether every row has a scale of its own.
        input_gram: Ĝ; the identity where None.
        output_gram: H; the identity where None.
        start: codes to improve in place of searching for new ones.
        sweeps: the most rounds of coordinate descent and solving.
        tolerance: stops where a round lowers the squared error by a smaller share.
        seed: of k-means.

    Returns:
        The codes; in the weighted norm never worse than those of the plain norm.

    Source: Gong et al. 2014, section 3.3 (product quantisation); van Baalen et al. 2024 (error feedback and
        solving for codebooks); Frantar et al. 2023, Algorithm 1, here for vectors.
    """
    if start is None:
        start = _first(matrix, subspaces, codewords, books, scaled, None, seed)
    plain = _separable(matrix, start, None, scaled, tolerance, sweeps)
    if input_gram is None and output_gram is None:
        return plain
    found = [start, plain]
    if isinstance(input_gram, DiagonalGram):
        found.append(_separable(matrix, plain, input_gram.diagonal().to(matrix), scaled, tolerance, sweeps))
    elif input_gram is not None:
        dense_metric = input_gram.dense()
        drawn = _first(matrix, subspaces, codewords, books, scaled, input_gram.diagonal().to(matrix), seed)
        found += [with_feedback(matrix, codes, dense_metric) for codes in (drawn, start)]

    def error(codes: Codes) -> float:
        return codes.error(matrix, input_gram, output_gram)

    best = min([*found, _solve(matrix, min(found, key=error), input_gram, output_gram, scaled)], key=error)
    if input_gram is None or isinstance(input_gram, DiagonalGram):
        return best
    metric = input_gram.dense().to(matrix)
    for _ in range(sweeps):
        trial = _solve(matrix, _sweep(matrix, best, metric), input_gram, output_gram, scaled)
        before, now = error(best), error(trial)
        if now < before:
            best = trial
        if not before - now > tolerance * before:
            break
    return best


def _first(
    matrix: Tensor,
    subspaces: int,
    codewords: int,
    books: int,
    scaled: bool,
    importance: Tensor | None,
    seed: int,
) -> Codes:
    """Codebooks by k-means, points weighted by the metric's diagonal, with the nearest codes."""
    rows, columns = matrix.shape
    scales = matrix.new_ones(rows)
    if scaled:
        size = matrix.square().mean(1).sqrt()
        scales = torch.where(size > 0, size, 1.0)
    pieces = (matrix / scales[:, None]).reshape(rows, subspaces, columns // subspaces)
    weight = None if importance is None else importance.reshape(subspaces, -1).mean(1)
    owner = book_of(subspaces, books)
    codebooks, codes = [], torch.empty(rows, subspaces, dtype=torch.int64)
    for book in range(books):
        own = (owner == book).nonzero().flatten()
        points = pieces[:, own].flatten(0, 1)
        mass = None if weight is None else weight[own].expand(rows, -1).flatten()
        centres = cluster(points, codewords, weights=mass, seed=seed)
        codebooks.append(centres)
        codes[:, own] = nearest(points, centres).reshape(rows, -1).cpu()
    return Codes(codes.to(matrix.device), torch.stack(codebooks), scales)


def _separable(
    matrix: Tensor, codes: Codes, diagonal: Tensor | None, scaled: bool, tolerance: float, sweeps: int
) -> Codes:
    """Lloyd's iterations with scales, in a diagonal metric: every piece finds its codeword alone."""
    rows, subspaces = codes.codes.shape
    weights = (torch.ones_like(matrix[0]) if diagonal is None else diagonal).reshape(subspaces, -1)
    gram = None if diagonal is None else DiagonalGram(diagonal.double(), shrinkage=0.0)
    error, owner = codes.error(matrix, gram, None), codes.books()
    for _ in range(sweeps):
        pieces = (matrix / _safe(codes.scales)[:, None]).reshape(rows, subspaces, -1)
        chosen = torch.empty_like(codes.codes)
        for subspace in range(subspaces):
            root = weights[subspace].sqrt()
            chosen[:, subspace] = nearest(pieces[:, subspace] * root, codes.codebooks[owner[subspace]] * root)
        trial = _solve(matrix, replace(codes, codes=chosen), gram, None, scaled)
        now = trial.error(matrix, gram, None)
        if not now < error:
            break
        gain, error, codes = error - now, now, trial
        if gain <= tolerance * error:
            break
    return codes


def _safe(scales: Tensor) -> Tensor:
    return torch.where(scales.abs() > torch.finfo(scales.dtype).tiny, scales, 1.0)


def _solve(
    matrix: Tensor, codes: Codes, input_gram: Gram | None, output_gram: Gram | None, scaled: bool
) -> Codes:
    """Codebooks, and scales where there are any, by weighted least squares for given codes."""
    if scaled:

        def build(values: tuple[Tensor, ...]) -> Tensor:
            return synthesise(codes.codes, values[0], values[1])

        start: tuple[Tensor, ...] = (codes.codebooks, codes.scales)
    else:

        def build(values: tuple[Tensor, ...]) -> Tensor:
            return synthesise(codes.codes, values[0], codes.scales)

        start = (codes.codebooks,)
    found = refine(build, start, matrix, input_gram=input_gram, output_gram=output_gram, steps=2, products=8)
    return Codes(codes.codes, found[0], found[1] if scaled else codes.scales)


def with_feedback(matrix: Tensor, codes: Codes, metric: Tensor) -> Codes:
    """Chooses codewords subspace after subspace, every error handed on to the columns that are still open.

    With Ĝ⁻¹ = UᵀU, U upper triangular, the error E of a subspace J costs ‖E U_JJ⁻¹‖² after the best
    compensation, which takes E U_JJ⁻¹ U_J,later from the later columns.

    Args:
        matrix: W, shape (rows, columns).
        codes: codebooks and scales; the codes themselves are chosen anew.
        metric: Ĝ, float64, shape (columns, columns), positive definite or nearly so.

    Returns:
        The same codebooks and scales with new codes.
    """
    rows, subspaces = codes.codes.shape
    width, owner = matrix.shape[1] // subspaces, codes.books()
    upper = inverse_root(metric).to(matrix)
    scales, open_part = _safe(codes.scales)[:, None], matrix.clone()
    chosen = torch.empty_like(codes.codes)
    for subspace in range(subspaces):
        columns = slice(subspace * width, (subspace + 1) * width)
        codebook = codes.codebooks[owner[subspace]]
        # Errors are measured by the triangular block's inverse.
        root = torch.linalg.inv(upper[columns, columns])
        code = nearest(open_part[:, columns] / scales @ root, codebook @ root)
        chosen[:, subspace] = code
        passed_on = (open_part[:, columns] - codebook[code] * scales) @ root
        open_part[:, columns.stop :] -= passed_on @ upper[columns, columns.stop :]
    return replace(codes, codes=chosen)


def _sweep(matrix: Tensor, codes: Codes, metric: Tensor) -> Codes:
    """Coordinate descent: every codeword chosen anew, all others given.

    With the error E = W − Ŵ the best value of piece s is ŵ_s + (E Ĝ)_s Ĝ_ss⁻¹, and the error of another one
    is measured by Ĝ_ss.

    Args:
        matrix: W, shape (rows, columns).
        codes: the codes to improve.
        metric: Ĝ in the matrix's dtype, shape (columns, columns).

    Returns:
        The same codebooks and scales with codes of no larger error.
    """
    rows, subspaces = codes.codes.shape
    width, owner = matrix.shape[1] // subspaces, codes.books()
    scales, dense = _safe(codes.scales)[:, None], codes.dense()
    weighed = (matrix - dense) @ metric
    chosen = codes.codes.clone()
    for subspace in range(subspaces):
        columns = slice(subspace * width, (subspace + 1) * width)
        block = metric[columns, columns].double()
        values, vectors = torch.linalg.eigh(block)
        values = values.clamp_min(1e-12 * float(values.max().clamp_min(1e-300)))
        root, inverse = (vectors * values.sqrt()).to(matrix), (vectors / values.sqrt()).to(matrix)
        wanted = dense[:, columns] @ root + weighed[:, columns] @ inverse  # in coordinates of the root
        codebook = codes.codebooks[owner[subspace]]
        code = nearest(wanted / scales, codebook @ root)
        moved = code != chosen[:, subspace]
        if not bool(moved.any()):
            continue
        step = codebook[code] * scales - dense[:, columns]
        weighed -= step @ metric[columns]
        chosen[:, subspace] = code
    return replace(codes, codes=chosen)
