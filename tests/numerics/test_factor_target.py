"""A factor of a product, the others given, against the minimiser over all matrices."""

import pytest
import torch

from weft.numerics.factor_target import factor_target, product_of
from weft.numerics.gram import DenseGram, squared_error


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0), (1, 1), (2, 2), (0, 0)])
def test_errors_of_the_product_are_those_of_the_factor_in_its_own_metric(before: int, after: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    moments = [drawn(size, size) for size in (7, 9)]
    output_gram, input_gram = (DenseGram(moment @ moment.T) for moment in moments)
    lefts = [drawn(7, 4), drawn(4, 4)][:before]
    rights = [drawn(5, 5), drawn(5, 9)][2 - after :]
    rows, columns = (4 if before else 7), (5 if after else 9)
    matrix = drawn(7, 9)
    found = factor_target(matrix, lefts, rights, input_gram, output_gram)

    def whole(factor: torch.Tensor) -> torch.Tensor:
        return squared_error(matrix - product_of([*lefts, factor, *rights]), input_gram, output_gram)

    least = whole(found.target)
    for factor in (drawn(rows, columns), found.target + 0.1 * drawn(rows, columns)):
        own = squared_error(found.target - factor, found.columns, found.rows)
        torch.testing.assert_close(whole(factor), least + own)
