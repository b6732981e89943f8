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
    kernel: Tensor, ranks: tuple[int, int], *, sweeps: int = 60, tolerance: float = 1e-4
) -> ChannelTucker:
    """Higher-order orthogonal iteration from the truncated higher-order SVD.

    After the first factors a sweep takes one step of subspace iteration per mode in place of an
    eigendecomposition: U ← qr(M U) with M the moment of the unfolding. As M is positive semidefinite,
    tr(Uᵀ M U) never falls, and a sweep costs a third.

    Args:
        kernel: shape (outputs, channels, positions).
        ranks: (a, b), at most (outputs, channels).
        sweeps: most sweeps.
        tolerance: stops where a sweep gains relatively less of the core's energy.

    Returns:
        The factors; their error is never above that of the truncated higher-order SVD.
    """
    outer, inner = ranks
    outputs, channels, positions = kernel.shape
    rows = kernel.mT.reshape(outputs, -1)  # (outputs, positions · channels)
    columns = kernel.permute(1, 2, 0).reshape(channels, -1)  # (channels, positions · outputs)

    def unfolded_outputs(right: Tensor) -> Tensor:
        return (right.mT @ columns).reshape(-1, outputs).mT  # (outputs, b · positions)

    def unfolded_channels(left: Tensor) -> Tensor:
        return (left.mT @ rows).reshape(-1, channels).mT  # (channels, a · positions)

    right = _leading(columns @ columns.mT, inner)
    unfolded = unfolded_outputs(right)
    left = _leading(unfolded @ unfolded.mT, outer)
    if (
        outer == outputs or inner == channels
    ):  # with one mode whole, the other one's factor is optimal at once
        sweeps = 0
    before = 0.0
    for _ in range(sweeps):
        unfolded = unfolded_channels(left)
        right = torch.linalg.qr(unfolded @ (unfolded.mT @ right)).Q
        unfolded = unfolded_outputs(right)
        core = unfolded.mT @ left
        left = torch.linalg.qr(unfolded @ core).Q
        energy = float(core.square().sum())
        if energy <= before * (1 + tolerance):
            break
        before = energy
    return ChannelTucker(left, torch.einsum("fa,fcs,cb->abs", left, kernel, right), right.mT)


def _leading(moment: Tensor, count: int) -> Tensor:
    """The leading eigenvectors as columns."""
    return torch.linalg.eigh(moment).eigenvectors[:, -count:].flip(1)
