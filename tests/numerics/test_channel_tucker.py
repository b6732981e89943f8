"""Channel Tucker: exact truncations, the error table, and orthogonal iteration against tensorly's."""

import importlib

import pytest
import torch
from torch import Tensor

from weft.numerics.channel_tucker import (
    ChannelTucker,
    higher_order_svd,
    orthogonal_iteration,
    truncation_errors,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rebuilt(found: ChannelTucker) -> Tensor:
    return torch.einsum("fa,abs,bc->fcs", found.left, found.core, found.right)


def truncated(found: ChannelTucker, outer: int, inner: int) -> Tensor:
    return rebuilt(ChannelTucker(found.left[:, :outer], found.core[:outer, :inner], found.right[:inner]))


def test_the_error_table_is_that_of_every_truncation() -> None:
    kernel = drawn(5, 4, 3)
    found = higher_order_svd(kernel)
    torch.testing.assert_close(rebuilt(found), kernel)
    errors = truncation_errors(found.core)
    for outer in range(1, 6):
        for inner in range(1, 5):
            expected = (kernel - truncated(found, outer, inner)).square().sum()
            torch.testing.assert_close(errors[outer - 1, inner - 1], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (5, 2), (3, 4), (5, 4)])
def test_iteration_is_never_worse_than_truncation_and_exact_for_members(ranks: tuple[int, int]) -> None:
    kernel = drawn(5, 4, 3)
    found = orthogonal_iteration(kernel, ranks)
    best = (kernel - rebuilt(found)).square().sum()
    assert best <= (kernel - truncated(higher_order_svd(kernel), *ranks)).square().sum() + 1e-12
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(found.left.T @ found.left, eye[: ranks[0], : ranks[0]])
    torch.testing.assert_close(found.right @ found.right.T, eye[: ranks[1], : ranks[1]])
    member = rebuilt(found)
    torch.testing.assert_close(rebuilt(orthogonal_iteration(member, ranks)), member, rtol=1e-9, atol=1e-9)


def test_tensorly_finds_nothing_better() -> None:
    if importlib.util.find_spec("tensorly") is None:
        pytest.skip("tensorly is not installed")
    from tensorly.decomposition import partial_tucker  # noqa: PLC0415
    from tensorly.tenalg import multi_mode_dot  # noqa: PLC0415

    kernel = drawn(16, 12, 9)
    for ranks in ((4, 4), (8, 3)):
        (core, factors), _ = partial_tucker(kernel.numpy(), ranks, modes=[0, 1], n_iter_max=200, tol=1e-12)
        theirs = torch.from_numpy(multi_mode_dot(core, factors, modes=[0, 1]))
        ours = rebuilt(orthogonal_iteration(kernel, ranks, sweeps=200, tolerance=1e-12))
        assert float((kernel - ours).norm()) <= float((kernel - theirs).norm()) * (1 + 1e-6)
