"""Tucker: ranks in their three forms, closed forms at its borders, fits in the metric, chains as they run."""

import itertools

import pytest
import torch
from tests.test_structure_contract import dense_convolution, random_gram, random_weight
from torch import Tensor

from weft.numerics.vbmf import bayesian_rank
from weft.structures.base import Geometry, relative_error
from weft.structures.low_rank import LowRank
from weft.structures.tucker import Tucker

SHAPE = (12, 10, 3, 3)


def test_a_mode_at_its_full_rank_is_not_factored() -> None:
    weight = random_weight(SHAPE, torch.float64)
    names = {ranks: set(Tucker(ranks).fit(weight).stored()) for ranks in ((4, 3), (4, 10), (12, 3), (12, 10))}
    assert names == {
        (4, 3): {"left", "core", "right"},
        (4, 10): {"left", "core"},
        (12, 3): {"core", "right"},
        (12, 10): {"core"},
    }
    torch.testing.assert_close(Tucker((12, 10)).fit(weight).to_dense(), weight)


@pytest.mark.parametrize("weighted", [False, True])
def test_with_all_channels_it_is_low_rank_of_the_outputs(weighted: bool) -> None:
    weight = random_weight(SHAPE, torch.float64)
    grams = {"input_gram": random_gram(90), "output_gram": random_gram(12, seed=2)} if weighted else {}
    tucker, low_rank = Tucker((5, 10)).fit(weight, **grams), LowRank(5).fit(weight, **grams)
    torch.testing.assert_close(tucker.to_dense(), low_rank.to_dense(), rtol=1e-6, atol=1e-8)
    assert tucker.cost() == low_rank.cost()


def test_with_all_outputs_it_is_low_rank_of_the_channels() -> None:
    weight = random_weight(SHAPE, torch.float64)
    other = LowRank(4).fit(weight.transpose(0, 1).contiguous()).to_dense().transpose(0, 1)
    torch.testing.assert_close(Tucker((12, 4)).fit(weight).to_dense(), other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_on_a_matrix_a_share_is_that_of_the_singular_values(share: float) -> None:
    weight = random_weight((20, 30), torch.float64)
    member = Tucker(share).fit(weight)
    rank = round(share * 20)
    assert member.structure == Tucker((rank, rank))
    torch.testing.assert_close(member.to_dense(), LowRank(rank).fit(weight).to_dense(), rtol=1e-9, atol=1e-9)


def test_vbmf_takes_the_ranks_of_both_unfoldings() -> None:
    generator = torch.Generator().manual_seed(0)
    planted = Tucker((4, 3)).initialise((24, 20, 3, 3), generator=generator).to_dense().detach()
    noisy = planted + 0.1 * float(planted.std()) * torch.randn(planted.shape, generator=generator)
    member = Tucker().fit(noisy)
    assert member.structure == Tucker((4, 3))
    assert relative_error(planted, member.to_dense()) < relative_error(planted, noisy)
    matrix = random_weight((30, 20))
    assert Tucker("vbmf").fit(matrix).structure == Tucker((bayesian_rank(matrix),) * 2)
    assert Tucker("vbmf").parameter_count(SHAPE) is None


@pytest.mark.parametrize("ranks", [(4, 3), (12, 3), (8, 6)])
@pytest.mark.parametrize("with_output", [False, True])
def test_the_weighted_fit_gains_and_finds_no_better_factor_by_alternation(
    ranks: tuple[int, int], with_output: bool
) -> None:
    """Against many rounds of exact alternating least squares with the normal equations of each factor."""
    weight = random_weight(SHAPE, torch.float64)
    inner, outer = random_gram(90), random_gram(12, seed=2)
    grams = {"input_gram": inner, "output_gram": outer} if with_output else {"input_gram": inner}
    member = Tucker(ranks).fit(weight, **grams)
    error = relative_error(weight, member.to_dense(), **grams)
    assert error < 0.99 * relative_error(weight, Tucker(ranks).fit(weight).to_dense(), **grams)
    metric = inner.dense()
    root_out = torch.linalg.cholesky(outer.dense()) if with_output else torch.eye(12, dtype=torch.float64)
    seen = (root_out.T @ weight.flatten(1) @ torch.linalg.cholesky(metric)).flatten()
    tensors = {name: tensor.clone() for name, tensor in member.stored().items()}
    best = error
    for _ in range(6):
        for name in tensors:  # the model is linear in every factor: least squares on its columns
            columns = []
            for index in range(tensors[name].numel()):
                unit = torch.zeros(tensors[name].numel(), dtype=torch.float64)
                unit[index] = 1.0
                probe = member.structure.from_tensors(
                    SHAPE, {**tensors, name: unit.reshape(tensors[name].shape)}
                )
                dense = probe.to_dense().detach().flatten(1)
                columns.append((root_out.T @ dense @ torch.linalg.cholesky(metric)).flatten())
            solved = torch.linalg.lstsq(torch.stack(columns, 1), seen, driver="gelsd").solution
            tensors[name] = solved.reshape(tensors[name].shape)
        again = member.structure.from_tensors(SHAPE, tensors)
        best = min(best, relative_error(weight, again.to_dense(), **grams))
    assert error <= 1.01 * best


def test_the_error_curve_is_undominated_by_proportional_ranks_and_what_fits_give() -> None:
    weight = random_weight((16, 12, 3, 3))
    for grams in ({}, {"input_gram": random_gram(108)}):
        curve = Tucker.error_curve(weight, **grams)
        counts = [point.cost.parameters for point in curve]
        assert counts == sorted(counts)
        assert counts[-1] < weight.numel()
        for point in curve[:: len(curve) // 4]:
            member = point.structure.fit(weight, **grams)
            assert member.cost() == point.cost
            error = relative_error(weight, member.to_dense(), **grams)
            assert error <= point.error * (1 + 1e-6)
            assert error >= 0.97 * point.error
        for share in (0.3, 0.6):
            member = Tucker(share).fit(weight, **grams)
            error = relative_error(weight, member.to_dense(), **grams)
            better = [
                point.error for point in curve if point.cost.parameters <= 1.2 * member.cost().parameters
            ]
            assert min(better) <= error * 1.01


STRIDES, DILATIONS = ((1, 1), (2, 3)), ((1, 1), (2, 1))
PADDINGS = (((0, 0), (0, 0)), ((1, 1), (2, 2)), ((0, 1), (2, 1)))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_combination_of_a_chains_geometry_equals_the_dense_convolution(
    mode: str, groups: int, chain: object
) -> None:
    member = chain
    bias = torch.randn(member.outputs, dtype=torch.float64)
    x = torch.randn(2, member.shape[1] * groups, 8, 9, dtype=torch.float64)
    for stride, dilation, padding in itertools.product(STRIDES, DILATIONS, PADDINGS):
        geometry = Geometry(stride, padding, dilation, groups, mode)
        expected = dense_convolution(x, member.to_dense(), bias, geometry)
        torch.testing.assert_close(member.convolve(x, geometry, bias), expected, rtol=1e-10, atol=1e-10)


@pytest.fixture(
    params=["tucker", "tucker_left", "tucker_right", "canonical_polyadic", "separable", "low_rank"],
)
def chain(request: pytest.FixtureRequest) -> object:
    from weft.structures import family  # noqa: PLC0415

    size = {"tucker": (3, 2), "tucker_left": (3, 4), "tucker_right": (6, 2)}.get(request.param)
    name = {"canonical_polyadic": "CanonicalPolyadic", "separable": "Separable", "low_rank": "LowRank"}
    structure = Tucker(size) if size else family(name[request.param])(3)
    return structure.initialise((6, 4, 3, 2), dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_counts_are_those_of_the_steps_that_run() -> None:
    """The 1×1 convolution in front sees every input position, the others the strided ones."""
    geometry = Geometry((2, 2), ((1, 1), (1, 1)), (1, 1), input_size=(8, 8))
    assert Tucker((4, 3)).multiply_adds(SHAPE, geometry) == 64 * 10 * 3 + 16 * (3 * 9 * 4 + 4 * 12)
    assert Tucker((4, 10)).multiply_adds(SHAPE, geometry) == 16 * (10 * 9 * 4 + 4 * 12)
    assert Tucker((12, 3)).multiply_adds(SHAPE, geometry) == 64 * 10 * 3 + 16 * 3 * 9 * 12


def test_bad_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="ranks must be one of 'vbmf'"):
        Tucker("bayes")
    with pytest.raises(ValueError, match="ranks must be a share above 0 and at most 1, got 1.5"):
        Tucker(1.5)
    with pytest.raises(ValueError, match="ranks must be two whole numbers"):
        Tucker((1, 2, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ranks\[1\] must be at least 1, got 0"):
        Tucker((1, 0))
    with pytest.raises(TypeError, match=r"ranks\[0\] must be a whole number"):
        Tucker((1.0, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ranks must be a number"):
        Tucker(None)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"ranks\[1\] must be between 1 and 10 for a \(12, 10, 3, 3\) weight"
    ):
        Tucker((3, 11)).fit(torch.zeros(SHAPE))


def test_a_zero_kernel_gives_zero() -> None:
    zero: Tensor = torch.zeros(SHAPE)
    for structure in (Tucker((3, 4)), Tucker(), Tucker(0.5)):
        for grams in ({}, {"input_gram": random_gram(90)}):
            assert not structure.fit(zero, **grams).to_dense().any()
