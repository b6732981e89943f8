"""Variational Bayes: planted ranks, and the analytic solution against a minimisation of the free energy
itself."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from torch import Tensor

from weft.numerics.vbmf import BayesianFactorisation, bayesian_rank, denoise, empirical_bayes


def planted(rows: int, columns: int, rank: int, noise: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return draw(rows, rank) @ draw(rank, columns) + noise * draw(rows, columns)


@pytest.mark.parametrize(
    ("rows", "columns", "rank", "noise"),
    [
        (40, 90, 3, 0.1),
        (90, 40, 5, 2.0),
        (100, 100, 10, 1.0),
        (64, 576, 20, 0.5),
        (30, 300, 0, 1.0),
        (50, 50, 0, 3.0),
    ],
)
def test_planted_rank_and_noise_are_found(rows: int, columns: int, rank: int, noise: float) -> None:
    for seed in range(3):
        found = empirical_bayes(planted(rows, columns, rank, noise, seed))
        assert found.rank == rank
        assert math.sqrt(found.noise_variance) == pytest.approx(noise, rel=0.05)


def component_energy(point: np.ndarray, gamma: float, rows: int, columns: int, variance: float) -> float:
    """Twice the free energy of one component over that of its absence, from the definition of the model.

    With posterior means a, b and variances s, t per entry it is the divergences from the priors plus the
    expected squared error over σ²,

        M log(c²/s) + (a² + Ms)/c² − M + L log(d²/t) + (b² + Lt)/d² − L
            + (−2abγ + (a² + Ms)(b² + Lt)) / σ².

    The optimal priors are c² = (a² + Ms)/M and d² likewise. Only x = a²/(a² + Ms), y = b²/(b² + Lt) and one
    scale are left, and the optimal scale turns the last line into −γ² x y / σ², with ab = γ x y.
    """
    x, y = point
    return -columns * math.log1p(-x) - rows * math.log1p(-y) - gamma**2 / variance * x * y


def minimised(gamma: float, rows: int, columns: int, variance: float) -> tuple[float, float]:
    """The least free energy and a·b there, by numerical search over the unit square."""
    grid = np.linspace(0.01, 0.99, 50)
    starts = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    start = min(starts, key=lambda point: component_energy(point, gamma, rows, columns, variance))
    found = optimize.minimize(
        component_energy,
        start,
        args=(gamma, rows, columns, variance),
        bounds=[(1e-9, 1 - 1e-9)] * 2,
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-10},
    )
    return float(found.fun), float(gamma * found.x[0] * found.x[1])


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (4, 12), (10, 11)])
@pytest.mark.parametrize("variance", [1.0, 0.3])
def test_a_component_is_kept_where_it_lowers_the_free_energy_and_shrunk_to_its_minimum(
    rows: int, columns: int, variance: float
) -> None:
    """The oracle knows neither threshold nor shrinkage: it minimises the free energy of the model."""
    kept = []
    for factor in np.linspace(0.8, 2.0, 13):
        gamma = factor * math.sqrt(variance) * (math.sqrt(rows) + math.sqrt(columns))
        matrix = torch.zeros(rows, columns, dtype=torch.float64)
        matrix[0, 0] = gamma
        found = empirical_bayes(matrix, noise_variance=variance)
        energy, estimate = minimised(gamma, rows, columns, variance)
        assert found.rank == (energy < 0)
        kept.append(found.rank)
        if found.rank:
            assert float(found.values[0]) == pytest.approx(estimate, rel=1e-4)
    assert 0 in kept
    assert 1 in kept


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 3), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_no_noise_variance_has_less_free_energy_than_the_estimated_one(
    rows: int, columns: int, rank: int, seed: int
) -> None:
    """Over σ² from a fine grid; the sum over all components of the free energy is (5) times M."""
    matrix = planted(rows, columns, min(rank, rows, columns), 0.5, seed)
    found = empirical_bayes(matrix)
    high = float(matrix.square().mean())
    for variance in np.geomspace(max(found.noise_variance, 1e-3 * high), high, 60):
        at = empirical_bayes(matrix, noise_variance=float(variance))
        # At a given σ² the reported energy is free of the constant that the matrix' scale adds.
        assert found.free_energy <= at.free_energy + 1e-9


def test_scale_and_transposition_do_not_matter() -> None:
    matrix = planted(20, 50, 4, 0.7)
    found = empirical_bayes(matrix)
    for other, scale in ((matrix.T, 1.0), (1e-12 * matrix, 1e-12), (1e12 * matrix, 1e12)):
        again = empirical_bayes(other.contiguous())
        assert again.rank == found.rank
        torch.testing.assert_close(again.values / scale, found.values, rtol=1e-6, atol=0)
        assert again.noise_variance / scale**2 == pytest.approx(found.noise_variance, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding_is_noise(dtype: torch.dtype) -> None:
    assert bayesian_rank(planted(20, 30, 3, 0.0).to(dtype)) == 3
    assert empirical_bayes(torch.zeros(4, 6, dtype=dtype)).rank == 0
    assert bayesian_rank(torch.zeros(4, 6, dtype=dtype)) == 1
    assert bayesian_rank(torch.ones(1, 1, dtype=dtype)) == 1


def test_the_posterior_mean_is_nearer_to_what_was_planted() -> None:
    signal, noise = planted(60, 80, 4, 0.0), planted(60, 80, 0, 2.0, seed=5)
    noisy = signal + noise
    assert float((denoise(noisy) - signal).norm()) < 0.5 * float(noise.norm())
    assert denoise(noisy.float()).dtype == torch.float32


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="noise_variance must be a finite number above 0"):
        empirical_bayes(torch.ones(2, 2), noise_variance=0.0)
    with pytest.raises(ValueError, match="matrix must be two-dimensional"):
        empirical_bayes(torch.ones(2))
    with pytest.raises(TypeError, match="float32 or float64"):
        empirical_bayes(torch.ones(2, 2, dtype=torch.int64))


def test_musco_finds_the_same() -> None:
    """musco-pytorch has an implementation of its own, with a local search for σ²."""
    package = importlib.util.find_spec("musco")
    if package is None or not package.submodule_search_locations:
        pytest.skip("musco-pytorch is not installed")
    path = Path(package.submodule_search_locations[0]) / "pytorch/compressor/rank_selection/vbmf.py"
    spec = importlib.util.spec_from_file_location("musco_vbmf", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for rows, columns, rank, noise in ((40, 90, 3, 0.1), (100, 100, 10, 1.0), (64, 576, 20, 0.5)):
        matrix = planted(rows, columns, rank, noise)
        found: BayesianFactorisation = empirical_bayes(matrix)
        _, values, _, posterior = module.EVBMF(matrix.numpy())
        assert found.rank == len(values)
        np.testing.assert_allclose(found.values.numpy(), np.diag(values), rtol=1e-4)
        assert found.noise_variance == pytest.approx(float(posterior["sigma2"]), rel=1e-3)
