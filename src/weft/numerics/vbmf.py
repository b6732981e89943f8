"""The rank of a noisy matrix by empirical variational Bayesian matrix factorisation, solved in closed form.

The model is V = B Aᵀ + noise of variance σ², with Gaussian priors on the columns of A and B whose variances
are estimated too. Its variational posterior is a global minimum of the free energy, and Nakajima et al. found
that minimum analytically: a singular value γ of V either vanishes or shrinks to a known smaller value, so
that the rank is the number of singular values above a threshold. Equation numbers here count the steps of
that solution, for V of shape (L, M) with L ≤ M and α = L / M.

    Φ(z) = log(z + 1) / z − 1/2,     τ̲ is the zero of Φ(τ) + Φ(τ / α)                              (1)
    threshold  γ̲ = σ √(M x̲),        x̲ = (1 + τ̲)(1 + α / τ̲)                                         (2)
    estimate   γ̂ = γ/2 (1 − (L + M)σ²/γ² + √((1 − (L + M)σ²/γ²)² − 4LMσ⁴/γ⁴))  where γ ≥ γ̲, else 0   (3)
    τ(x) = (x − (1 + α) + √((x − (1 + α))² − 4α)) / 2                                               (4)
    free energy per M, up to a constant, as a function of σ²: the sum over h of
        x − log x + [x > x̲] (log(τ + 1) + α log(τ / α + 1) − τ),  x = γ_h² / (M σ²), τ = τ(x)        (5)
    σ² lies between max(γ²_{H+1} / (M x̲), Σ_{h>H} γ_h² / (M (L − H))) and Σ_h γ_h² / (L M),
        H = ⌈L / (1 + α)⌉ − 1                                                                       (6)
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch import Tensor

from weft import checks
from weft.numerics.svd import check_matrix, singular_value_decomposition, singular_values

# How finely the free energy is searched for the basin of its global minimum before the local search.
_NOISE_GRID = 400


@dataclass(frozen=True)
class BayesianFactorisation:
    """What variational Bayes makes of a matrix.

    Attributes:
        rank: the number of singular values above the threshold.
        values: the shrunk singular values, shape (rank,), float64, descending.
        noise_variance: σ², given or estimated.
        free_energy: (5) at σ², the sum over h in units of M, without its constant.
    """

    rank: int
    values: Tensor
    noise_variance: float
    free_energy: float


def empirical_bayes(matrix: Tensor, noise_variance: float | None = None) -> BayesianFactorisation:
    """The global solution of empirical variational Bayesian matrix factorisation.

    Args:
        matrix: shape (rows, columns), float32 or float64; it is not centred.
        noise_variance: σ² where it is known; estimated by minimising the free energy where None.

    Returns:
        Rank, shrunk singular values, noise variance and free energy. A zero matrix has rank 0.

    Source: Nakajima, Sugiyama, Babacan and Tomioka, Global analytic solution of fully-observed variational
        Bayesian matrix factorization, Journal of Machine Learning Research 14 (2013), theorems 2, 4 and 5
        and section 6; Kim et al., ICLR 2016, section 3.2, for its use on the modes of a kernel.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> low = torch.randn(40, 3, generator=generator) @ torch.randn(3, 90, generator=generator)
        >>> empirical_bayes(low + 0.1 * torch.randn(40, 90, generator=generator)).rank
        3
    """
    check_matrix(matrix)
    if noise_variance is not None:
        checks.positive("noise_variance", noise_variance)
    resolution = torch.finfo(matrix.dtype).eps * max(matrix.shape)
    return _solve(singular_values(matrix.detach().double()), max(matrix.shape), noise_variance, resolution)


def bayesian_rank(matrix: Tensor) -> int:
    """The rank that empirical variational Bayes finds, at least 1.

    Args:
        matrix: shape (rows, columns), float32 or float64.

    Returns:
        Between 1 and min(rows, columns).
    """
    return max(1, empirical_bayes(matrix).rank)


def denoise(matrix: Tensor, noise_variance: float | None = None) -> Tensor:
    """The posterior mean: singular values below the threshold dropped, the others shrunk by (3).

    Args:
        matrix: shape (rows, columns), float32 or float64.
        noise_variance: σ² where it is known.

    Returns:
        The same shape and dtype.
    """
    found = empirical_bayes(matrix, noise_variance)
    left, _, right = singular_value_decomposition(matrix)
    return (left[:, : found.rank] * found.values.to(matrix)) @ right[: found.rank]


def _solve(
    singular: Tensor, columns: int, noise_variance: float | None, resolution: float
) -> BayesianFactorisation:
    gamma = singular.cpu().numpy()
    rows = len(gamma)
    scale = float(gamma[0])
    if scale <= 0:
        return BayesianFactorisation(0, singular.new_zeros(0), 0.0, -math.inf)
    gamma = gamma / scale  # the solution scales with the matrix; squares of tiny values must not vanish
    ratio = rows / columns
    threshold = _threshold(ratio)
    energies = np.square(gamma) / columns
    if noise_variance is None:
        # Rounding is noise too: no singular value below the matrix's numerical rank is ever found.
        variance = _noise(energies, ratio, threshold, resolution**2 / (columns * threshold))
    else:
        variance = noise_variance / scale**2
    kept = gamma[energies > variance * threshold]
    inner = 1 - (rows + columns) * variance / np.square(kept)
    root = np.sqrt(np.maximum(np.square(inner) - 4 * rows * columns * (variance / np.square(kept)) ** 2, 0))
    shrunk = kept / 2 * (inner + root) * scale  # (3)
    energy = _free_energy(variance, energies, ratio, threshold)
    return BayesianFactorisation(len(kept), torch.from_numpy(shrunk), variance * scale**2, energy)


def _threshold(ratio: float) -> float:
    """x̲ of (2); τ̲ is about 2.5129 √α."""

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    guess = 2.5129 * math.sqrt(ratio)
    found = optimize.root_scalar(lambda t: phi(t) + phi(t / ratio), bracket=(guess / 4, guess * 4))  # (1)
    tau = float(found.root)
    return (1 + tau) * (1 + ratio / tau)


def _free_energy(variance: float, energies: NDArray[np.float64], ratio: float, threshold: float) -> float:
    """(5), with the energies γ_h² / M."""
    x = np.maximum(energies / variance, np.finfo(np.float64).tiny)
    total = float((x - np.log(x)).sum())
    above = x[x > threshold]
    spread = above - (1 + ratio)
    tau = (spread + np.sqrt(np.maximum(np.square(spread) - 4 * ratio, 0))) / 2  # (4)
    return total + float((np.log1p(tau) + ratio * np.log1p(tau / ratio) - tau).sum())


def _noise(energies: NDArray[np.float64], ratio: float, threshold: float, least: float) -> float:
    """The σ² of least free energy between the bounds (6) that is at least `least`."""
    rows = len(energies)
    most = max(0, math.ceil(rows / (1 + ratio)) - 1)  # H: more components than that are never found
    tail = energies[most:]
    low = max(float(tail[0]) / threshold, float(tail.mean()), least)
    high = float(energies.mean())
    if not high > low:
        return low

    def energy(logarithm: float) -> float:
        return _free_energy(math.exp(logarithm), energies, ratio, threshold)

    # The free energy has a kink wherever a singular value crosses the threshold, and basins between them.
    kinks = np.log(np.maximum(energies / threshold, 1e-300))
    grid = np.linspace(math.log(low), math.log(high), _NOISE_GRID)
    grid = np.unique(np.concatenate([grid, kinks[(kinks > grid[0]) & (kinks < grid[-1])]]))
    values = [energy(point) for point in grid]
    best = int(np.argmin(values))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    found = optimize.minimize_scalar(energy, bounds=bounds, method="bounded", options={"xatol": 1e-12})
    return math.exp(found.x if found.fun < values[best] else grid[best])
