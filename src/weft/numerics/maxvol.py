"""Rows of a tall matrix that all its other rows are moderate combinations of: a submatrix of large volume.

Every matrix of rank r is L R with r columns in L. With r rows of L that are independent, L_J, it is also
T (L_J R), T = L L_J⁻¹: r of its own rows, and the combinations of them that give the others. The rows are
chosen such that no entry of T exceeds a bound, so that the form is as well conditioned as the matrix.
"""

import torch
from torch import Tensor

from weft import checks
from weft.numerics.bit_mask import mask_of
from weft.numerics.svd import check_matrix


def rows_of_large_volume(left: Tensor, *, bound: float = 2.0) -> tuple[Tensor, Tensor]:
    """Chooses independent rows and expresses all rows by them.

    The rows that elimination with partial pivoting takes are the start. Then the largest entry of T decides:
    while it exceeds the bound, its row takes the place of the one that it multiplies, which enlarges the
    volume |det L_J| by that factor; T follows by an update of rank one.

    Args:
        left: L, shape (rows, rank), float32 or float64, rank <= rows.
        bound: the largest entry of T that is left as it is, above 1.

    Returns:
        The chosen rows J, ascending, shape (rank,), and T in float64, shape (rows, rank), with T[J] the
        identity to the last bit. Where L has less than full rank, so that no rows of it are independent, T
        is the least solution of T L_J = L.

    Raises:
        ValueError: there are more columns than rows, or the bound is not above 1.

    Source: Goreinov, Oseledets, Savostyanov, Tyrtyshnikov and Zamarashkin, How to find a good submatrix
        (2010), algorithm 1; Cheng, Gimbutas, Martinsson and Rokhlin, On the compression of low rank matrices,
        SIAM J. Sci. Comput. 26 (2005), for the form.
    """
    check_matrix(left)
    rows, rank = left.shape
    if rank > rows:
        raise ValueError(
            checks.fault("left", "at least as many rows as columns", tuple(left.shape), "pass Lᵀ")
        )
    if not bound > 1:
        raise ValueError(checks.fault("bound", "above 1", bound, "use the default of 2"))
    matrix = left.double()
    factors, swaps, _ = torch.linalg.lu_factor_ex(matrix)
    order = torch.arange(rows, device=left.device)
    for step, other in enumerate((swaps - 1).tolist()):
        order[[step, other]] = order[[other, step]]
    chosen = order[:rank]
    diagonal = factors.diagonal().abs()
    if bool(diagonal.min() <= rows * torch.finfo(left.dtype).eps * diagonal.max()):
        chosen = chosen.sort().values
        table = torch.linalg.lstsq(matrix[chosen].mT, matrix.mT, driver="gelsd").solution.mT
        return chosen, _with_unit_rows(table, chosen)
    table = torch.linalg.solve(matrix[chosen].mT, matrix.mT).mT.contiguous()
    # Each exchange multiplies the volume by more than the bound, so their number is limited; rounding must
    # not make them go round in circles.
    for _ in range(4 * rank + 16):
        place = int(table.abs().argmax())
        row, column = divmod(place, rank)
        if float(table[row, column].abs()) <= bound:
            break
        change = table[row].clone()
        change[column] -= 1.0
        table -= table[:, column, None] * (change / table[row, column])
        chosen[column] = row
    places = chosen.argsort()
    return chosen[places], _with_unit_rows(table[:, places], chosen[places])


def by_own_rows(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A product of two factors as some of its own rows and the combinations that give the others.

    Args:
        left: L, shape (rows, rank).
        right: R, shape (rank, columns).

    Returns:
        The chosen rows of L R as columns, (columns, rank), and for every other row its combination, (rank,
        rows − rank), both in L's dtype; and which rows are chosen, a mask, (rows,).
    """
    chosen, table = rows_of_large_volume(left)
    marked = mask_of(chosen, len(table))
    # In full precision: the rows are stored as they are, and everything else builds on them.
    own = (left[chosen].double() @ right.double()).mT
    return own.to(left.dtype), table[~marked].mT.to(left.dtype), marked


def with_identity(combinations: Tensor, places: Tensor) -> Tensor:
    """Undoes the choice of `by_own_rows` for the left factor, a chosen row being one of the identity.

    Args:
        combinations: shape (rank, rows − rank).
        places: where each row stands once the chosen ones come first, shape (rows,).

    Returns:
        The left factor's transpose, shape (rank, rows).
    """
    identity = torch.eye(len(combinations), dtype=combinations.dtype, device=combinations.device)
    return torch.cat([identity, combinations], 1)[:, places]


def _with_unit_rows(table: Tensor, chosen: Tensor) -> Tensor:
    """The chosen rows, as rows of the identity that rounding does not touch."""
    table = table.contiguous()
    table[chosen] = torch.eye(len(chosen), dtype=table.dtype, device=table.device)
    return table
