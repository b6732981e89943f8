"""Tucker decomposition of the two channel modes of a kernel: W ≈ U · core · V, all other modes as they are.

A kernel is taken as (outputs, channels, positions); U (outputs, a) and V (b, channels) are orthonormal and
the core is (a, b, positions). The truncated higher-order SVD takes both factors from the unfoldings of W
itself; higher-order orthogonal iteration then alternates: U from the unfolding of W ×_channels V, V from that
of Uᵀ W.

Source: De Lathauwer, De Moor and Vandewalle, A multilinear singular value decomposition, SIAM Journal on
    Matrix Analysis 21 (2000), and On the best rank-1 and rank-(R1, ..., RN) approximation, ibid.; Kim et al.,
    ICLR 2016.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ChannelTucker(NamedTuple):
    """Factors of the channel modes.

    Attributes:
        left: U, shape (outputs, a), orthonormal columns.
        core: shape (a, b, positions).
        right: V, shape (b, channels), orthonormal rows.
    """

    left: Tensor
    core: Tensor
    right: Tensor


def higher_order_svd(kernel: Tensor) -> ChannelTucker:
    """The whole higher-order SVD of the channel modes; every pair of ranks is a truncation of it.

    Args:
        kernel: shape (outputs, channels, positions).

    Returns:
        Square orthonormal factors, most energy first.
    """
    left = _leading(torch.einsum("fcs,gcs->fg", kernel, kernel), len(kernel))
    right = _leading(torch.einsum("fcs,fds->cd", kernel, kernel), kernel.shape[1]).mT
    return ChannelTucker(left, torch.einsum("fa,fcs,bc->abs", left, kernel, right), right)


def truncation_errors(core: Tensor) -> Tensor:
    """The squared errors of all truncations of a higher-order SVD: what of the core's energy is left out.

    Args:
        core: the whole core, shape (outputs, channels, positions).

    Returns:
        Shape (outputs, channels): entry (a − 1, b − 1) is the squared error at ranks (a, b).
    """
    energy = core.double().square().sum(2)
    return (energy.sum() - energy.cumsum(0).cumsum(1)).clamp_min(0)


def orthogonal_iteration(
    kernel: Tensor, ranks: tuple[int, int], *, sweeps: int = 20, tolerance: float = 1e-6
) -> ChannelTucker:
    """Higher-order orthogonal iteration from the truncated higher-order SVD.

    Args:
        kernel: shape (outputs, channels, positions).
        ranks: (a, b), at most (outputs, channels).
        sweeps: most sweeps.
        tolerance: stops where a sweep gains relatively less of the core's energy.

    Returns:
        The factors; their error is never above that of the truncated higher-order SVD.
    """
    outer, inner = ranks
    outputs, channels, _ = kernel.shape
    right = _leading(torch.einsum("fcs,fds->cd", kernel, kernel), inner).mT
    left = torch.eye(outputs, dtype=kernel.dtype, device=kernel.device)
    before = 0.0
    # With one mode whole, the other one's factor is optimal at once.
    for _ in range(1 if outer == outputs or inner == channels else sweeps):
        if outer < outputs:
            reduced = torch.einsum("fcs,bc->fbs", kernel, right).flatten(1)
            left = _leading(reduced @ reduced.mT, outer)
        if inner < channels:
            reduced = torch.einsum("fa,fcs->cas", left, kernel).flatten(1)
            right = _leading(reduced @ reduced.mT, inner).mT
        energy = float(torch.einsum("fa,fcs,bc->abs", left, kernel, right).square().sum())
        if energy <= before * (1 + tolerance):
            break
        before = energy
    return ChannelTucker(left, torch.einsum("fa,fcs,bc->abs", left, kernel, right), right)


def _leading(moment: Tensor, count: int) -> Tensor:
    """The leading eigenvectors as columns."""
    return torch.linalg.eigh(moment).eigenvectors[:, -count:].flip(1)
