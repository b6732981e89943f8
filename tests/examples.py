"""One registration line per structure: what the contract tests, storage, layers and planner tests run on.

An example gives a structure for any weight shape, so that every law meets wide, tall, square, prime and
size-1 shapes. Tolerances that differ from the contract's stand here, each with its reason.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from weft.structures.base import Geometry, Shape, Structure, matrix_shape
from weft.structures.canonical_polyadic import CanonicalPolyadic
from weft.structures.dense import Dense
from weft.structures.divided_rows import DividedRows
from weft.structures.hierarchical import Hierarchical
from weft.structures.interpolative import Interpolative
from weft.structures.low_rank import LowRank
from weft.structures.product_quantized import ProductQuantized
from weft.structures.pruned import Pruned
from weft.structures.quantized import Quantized
from weft.structures.reshaped import Reshaped
from weft.structures.semiseparable import SequentiallySemiseparable
from weft.structures.separable import Separable
from weft.structures.sparse_product import SparseProduct
from weft.structures.sum_of import SumOf
from weft.structures.tensor_train import TensorTrain
from weft.structures.tucker import Tucker


@dataclass(frozen=True)
class Example:
    """A structure under test.

    Attributes:
        name: the test id.
        structure: the structure for a weight's shape.
        exact: whether fitting a member's own dense weight gives it back (in float64, without a start).
        monotone: size arguments with increasing values, along which a dearer member never fits worse; values
            that are impossible for a shape are passed over.
        forward_tolerance: relative, in float32; the contract's 1e-5 unless `reason` says why not.
        exact_tolerance: relative, in float64.
        weighted_tolerance: how much worse, relatively, a weighted fit may be than the plain one in the
            weighted norm.
        curve_tolerance: how far, relatively, a fit's error may be from that on the error curve.
        reason: why a tolerance differs or a law is not claimed.
    """

    name: str
    structure: Callable[[Shape], Structure]
    exact: bool = False
    monotone: Mapping[str, Sequence[object]] = field(default_factory=dict)
    forward_tolerance: float = 1e-5
    exact_tolerance: float = 1e-9
    weighted_tolerance: float = 1e-5
    curve_tolerance: float = 2e-2
    reason: str = ""


def _quarter(shape: Shape) -> int:
    return max(1, min(matrix_shape(shape)) // 4)


def _part(shape: Shape, axis: int) -> int:
    """Half of a kernel's mode; on a matrix half of the smaller side."""
    return max(1, (shape[axis] if len(shape) > 2 and max(shape[2:]) > 1 else min(shape[:2])) // 2)


def _stages(shape: Shape) -> int:
    return min(4, *matrix_shape(shape))


def _divisor(shape: Shape) -> int:
    """Subspaces of two or three inputs where these divide, else of one."""
    _, inputs = matrix_shape(shape)
    return inputs // next(width for width in (3, 2, 1) if inputs % width == 0)


def _pruned_pattern(shape: Shape) -> Pruned:
    """One pattern after the other over the shapes, blocks and n:m where they divide."""
    outputs, inputs = matrix_shape(shape)
    if inputs % 4 == 0 and outputs % 4 == 0:
        return Pruned(0.5, pattern="2:4") if inputs == outputs else Pruned(0.4, pattern="4x2", score="search")
    return Pruned(0.5, pattern="rows" if inputs > outputs else "columns", score="search")


def _twice_the_rows(shape: Shape) -> int:
    """A view with more rows where the inputs can be divided, else with fewer."""
    outputs, inputs = matrix_shape(shape)
    return outputs * next((factor for factor in (2, 3, 5) if inputs % factor == 0), 1)


def _four_axes(shape: Shape) -> tuple[int, int, int, int]:
    """Outputs and inputs in two axes each."""
    outputs, inputs = matrix_shape(shape)
    first = next((factor for factor in (2, 3, 5) if outputs % factor == 0), 1)
    second = next((factor for factor in (2, 3, 5) if inputs % factor == 0), 1)
    return first, outputs // first, second, inputs // second


def _rows(shape: Shape) -> int:
    first, _, second, _ = _four_axes(shape)
    return first * second


def _part_rank(shape: Shape) -> int:
    """A rank that half of the rows can have."""
    return max(1, min(shape[0] // 2, matrix_shape(shape)[1], 2))


def _in_two(shape: Shape, important: Structure, rest: Structure) -> DividedRows:
    """A quarter of the rows apart from the rest, where there are two."""
    return DividedRows((important, rest), (0.25,)) if shape[0] > 1 else DividedRows((rest,))


EXAMPLES = [
    Example("dense", lambda shape: Dense(), exact=True),
    Example(
        "low_rank", lambda shape: LowRank(_quarter(shape)), exact=True, monotone={"rank": (1, 2, 3, 5, 8)}
    ),
    Example("low_rank_full", lambda shape: LowRank(min(matrix_shape(shape))), exact=True),
    Example("low_rank_randomized", lambda shape: LowRank(_quarter(shape), "randomized"), exact=True),
    Example(
        "low_rank_rrqr",
        lambda shape: LowRank(_quarter(shape), "rrqr"),
        exact=True,
        monotone={"rank": (1, 2, 3, 5, 8)},
    ),
    Example("low_rank_aca", lambda shape: LowRank(_quarter(shape), "aca"), exact=True),
    Example(
        "interpolative",
        lambda shape: Interpolative(_quarter(shape)),
        exact=True,
        monotone={"rank": (1, 2, 3, 5, 8)},
    ),
    Example(
        "hierarchical",
        lambda shape: Hierarchical(rank=1, leaf_size=5),
        exact=True,
        monotone={"rank": (1, 2, 3, 5, 8)},
    ),
    Example(
        "hierarchical_uniform",
        lambda shape: Hierarchical(rank=1, leaf_size=8, admissibility="uniform", clustering="automatic"),
        reason="the clustering of a planted member is not found again from its values",
    ),
    Example(
        "hierarchical_strong",
        lambda shape: Hierarchical(rank=1, leaf_size=4, admissibility="strong", method="aca_full"),
    ),
    Example(
        "hierarchical_geometric",
        lambda shape: Hierarchical(
            rank=_quarter(shape), tolerance=0.5, leaf_size=4, clustering="geometric", method="rrqr"
        ),
    ),
    Example(
        "hierarchical_adaptive",
        lambda shape: Hierarchical(
            tolerance=0.3, leaf_size=4, admissibility="adaptive", clustering="principal"
        ),
    ),
    Example(
        "sequentially_semiseparable",
        lambda shape: SequentiallySemiseparable(_stages(shape), min(2, _quarter(shape))),
        exact=True,
        monotone={"state_dimension": (1, 2, 3, 5, 8)},
    ),
    Example(
        "sequentially_semiseparable_tolerance",
        lambda shape: SequentiallySemiseparable(_stages(shape), tolerance=0.2),
        exact=True,
        monotone={"tolerance": (0.5, 0.2, 0.05, 1e-3)},
    ),
    Example("product_quantized", lambda shape: ProductQuantized(_divisor(shape), min(5, shape[0]))),
    Example(
        "product_quantized_separate",
        lambda shape: ProductQuantized(
            _divisor(shape), min(20, shape[0]), codebooks=_divisor(shape), scaled=False
        ),
    ),
    Example(
        "pruned",
        lambda shape: Pruned(0.3, score="search"),
        exact=True,
        monotone={"density": (0.05, 0.1, 0.3, 0.6, 1.0)},
    ),
    Example("pruned_pattern", lambda shape: _pruned_pattern(shape), exact=True),
    Example("pruned_low_rank", lambda shape: Pruned(0.6, of=LowRank(_quarter(shape)), score="input")),
    Example("reshaped", lambda shape: Reshaped(LowRank(1), rows=_twice_the_rows(shape)), exact=True),
    Example(
        "reshaped_kronecker",
        lambda shape: Reshaped(LowRank(1), _rows(shape), _four_axes(shape), (2, 0, 1, 3)),
        exact=True,
    ),
    Example("quantized", lambda shape: Quantized(4), monotone={"bits": (2, 3, 4, 6, 8)}),
    Example("quantized_low_rank", lambda shape: Quantized(8, of=LowRank(_quarter(shape)))),
    Example(
        "quantized_sparse_product",
        lambda shape: Quantized(4, of=SparseProduct(2, _quarter(shape), "splitting"), codebook="kmeans"),
    ),
    Example("divided_rows", lambda shape: _in_two(shape, LowRank(1), LowRank(_part_rank(shape)))),
    Example("divided_rows_quantized", lambda shape: _in_two(shape, Quantized(6), Quantized(3))),
    Example("sparse_product", lambda shape: SparseProduct(2, _quarter(shape))),
    Example("sparse_product_splitting", lambda shape: SparseProduct(3, _quarter(shape), "splitting")),
    Example("sparse_product_hierarchical", lambda shape: SparseProduct(2, _quarter(shape), "hierarchical")),
    Example("sparse_product_random", lambda shape: SparseProduct(1, _quarter(shape), "random")),
    Example("sum_of", lambda shape: SumOf((LowRank(_quarter(shape)), SparseProduct(1, 1, "splitting")))),
    Example(
        "sum_of_coded",
        lambda shape: SumOf((ProductQuantized(_divisor(shape), min(3, shape[0])), LowRank(1))),
    ),
    Example(
        "tensor_train",
        lambda shape: TensorTrain(_quarter(shape), cores=3),
        monotone={"rank": (1, 2, 3, 5, 8)},
        reason="what stands in the padding of a planted member is not known to the fit",
    ),
    Example(
        "tensor_train_balanced",
        lambda shape: TensorTrain(_quarter(shape), cores=2, method="randomized", modes="balanced"),
        reason="as above",
    ),
    Example(
        "tucker",
        lambda shape: Tucker((_part(shape, 0), _part(shape, 1))),
        exact=True,
        monotone={"ranks": ((1, 1), (2, 2), (3, 3), (5, 5), (8, 8))},
    ),
    Example("tucker_vbmf", lambda shape: Tucker("vbmf"), reason="the ranks of noise are not found again"),
    Example(
        "canonical_polyadic",
        lambda shape: CanonicalPolyadic(_quarter(shape)),
        monotone={"rank": (1, 2, 3, 5, 8)},
        curve_tolerance=0.3,
        reason="the curve starts every rank from the one before, a fit from nothing: other local minima",
    ),
    Example(
        "separable",
        lambda shape: Separable(max(1, min(shape[:2]) // 2)),
        exact=True,
        monotone={"rank": (1, 2, 3, 5, 8)},
    ),
]

LINEAR_SHAPES: tuple[Shape, ...] = ((6, 30), (30, 6), (16, 16), (13, 7), (1, 9), (9, 1), (1, 1), (40, 48))
CONVOLUTION_SHAPES: tuple[Shape, ...] = ((8, 4, 3, 3), (6, 5, 1, 1), (4, 3, 1, 5), (7, 1, 3, 3), (1, 3, 2, 2))
SHAPES = LINEAR_SHAPES + CONVOLUTION_SHAPES

GEOMETRIES: Mapping[str, Geometry] = {
    "plain": Geometry(stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), input_size=(9, 10)),
    "strided": Geometry(stride=(2, 3), padding=((1, 1), (2, 2)), dilation=(1, 1), input_size=(9, 10)),
    "dilated": Geometry(stride=(1, 2), padding=((2, 2), (2, 2)), dilation=(2, 1), input_size=(9, 10)),
    "asymmetric": Geometry(stride=(1, 1), padding=((0, 1), (1, 2)), dilation=(1, 1), input_size=(9, 10)),
    "reflect": Geometry(
        stride=(1, 1), padding=((1, 1), (2, 2)), dilation=(1, 1), padding_mode="reflect", input_size=(9, 10)
    ),
    "grouped": Geometry(
        stride=(1, 2), padding=((1, 1), (0, 0)), dilation=(1, 1), groups=2, input_size=(9, 10)
    ),
    "transposed": Geometry(
        stride=(2, 1),
        padding=((1, 1), (0, 0)),
        dilation=(1, 2),
        input_size=(9, 10),
        transposed=True,
        output_padding=(1, 0),
    ),
    "transposed_grouped": Geometry(
        stride=(1, 3),
        padding=((0, 0), (1, 1)),
        dilation=(1, 1),
        groups=2,
        input_size=(5, 4),
        transposed=True,
    ),
    "circular": Geometry(
        stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1), padding_mode="circular", input_size=(9, 10)
    ),
}


def name_of(value: object) -> str:
    """The test id of an example or a shape."""
    return value.name if isinstance(value, Example) else "x".join(map(str, value))  # type: ignore[call-overload]


each_example = pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
# Laws of the family as a whole are checked on its first example.
_FIRST = {type(example.structure((4, 4))): example for example in reversed(EXAMPLES)}
each_family = pytest.mark.parametrize("example", _FIRST.values(), ids=name_of)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=name_of)
each_convolution_shape = pytest.mark.parametrize("shape", CONVOLUTION_SHAPES, ids=name_of)
