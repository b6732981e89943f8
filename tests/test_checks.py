"""The wording and the bounds of the argument checks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft import checks


def test_a_fault_names_argument_expectation_value_and_remedy() -> None:
    message = checks.fault("rank", "between 1 and 512", 600, "use rank <= 512")
    assert message == "rank must be between 1 and 512, got 600; use rank <= 512"


@given(st.integers(-50, 50), st.integers(-20, 20), st.one_of(st.none(), st.integers(0, 30)))
def test_integer_between_accepts_exactly_the_closed_interval(value: int, low: int, width: int | None) -> None:
    high = None if width is None else low + width
    if value >= low and (high is None or value <= high):
        assert checks.integer_between("rank", value, low, high) == value
    else:
        with pytest.raises(ValueError, match=rf"rank must be .*{low}.* for a weight, got {value}; use rank"):
            checks.integer_between("rank", value, low, high, of="a weight")


@pytest.mark.parametrize("value", [True, 3.0, "3", None, torch.tensor(3)], ids=repr)
def test_integer_between_refuses_what_is_no_int(value: object) -> None:
    with pytest.raises(TypeError, match="rank must be a whole number between 1 and 5, got .*; pass an int"):
        checks.integer_between("rank", value, 1, 5)


@given(st.floats())
def test_share_accepts_exactly_the_half_open_interval(value: float) -> None:
    if 0 < value <= 1:
        assert checks.share("density", value) == value
    else:
        with pytest.raises(ValueError, match="density must be a share above 0 and at most 1"):
            checks.share("density", value)


def test_share_of_zero_only_where_allowed() -> None:
    assert checks.share("label_share", 0, zero_allowed=True) == 0.0
    with pytest.raises(ValueError, match=r"from 0 and at most 1, got -0\.5; use 0 <= label_share <= 1"):
        checks.share("label_share", -0.5, zero_allowed=True)
    with pytest.raises(TypeError, match="label_share must be a number up to 1, got '1'"):
        checks.share("label_share", "1")


@given(st.floats())
def test_positive_accepts_exactly_finite_numbers_above_zero(value: float) -> None:
    if value > 0 and math.isfinite(value):
        assert checks.positive("learning_rate", value) == value
    else:
        with pytest.raises(ValueError, match="learning_rate must be a finite number above 0"):
            checks.positive("learning_rate", value)


def test_positive_refuses_what_is_no_number() -> None:
    for value in (True, "0.1", None):
        with pytest.raises(TypeError, match="learning_rate must be a number above 0"):
            checks.positive("learning_rate", value)


def test_one_of_lists_the_known_values() -> None:
    checks.one_of("method", "svd", ("svd", "rrqr"))
    with pytest.raises(ValueError, match="method must be one of 'svd', 'rrqr', got 'qr'"):
        checks.one_of("method", "qr", ("svd", "rrqr"))


def test_finite_counts_the_bad_entries() -> None:
    tensor = torch.zeros(4, 3)
    checks.finite("weight", tensor)
    tensor[1, 2], tensor[0, 0], tensor[3, 1] = math.nan, math.inf, -math.inf
    with pytest.raises(ValueError, match="weight must be finite everywhere, got 3 NaN or infinite of 12"):
        checks.finite("weight", tensor)


@pytest.mark.parametrize("tensor", [torch.zeros(2, 2, dtype=torch.int64), [[1.0]], None], ids=repr)
def test_finite_refuses_what_is_no_floating_tensor(tensor: object) -> None:
    with pytest.raises(TypeError, match="weight must be a floating-point tensor"):
        checks.finite("weight", tensor)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (3, 0), (2, 3, 0, 1)], ids=str)
def test_weight_refuses_shapes_that_are_no_weights(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"weight must be of shape \(outputs, inputs\)"):
        checks.weight(torch.zeros(shape))


@given(st.lists(st.integers(0, 5), max_size=4), st.lists(st.integers(0, 5), max_size=4))
def test_shape_accepts_exactly_the_expected_one(got: list[int], expected: list[int]) -> None:
    if got == expected:
        checks.shape("bias", got, tuple(expected), "pass the layer's own")
    else:
        with pytest.raises(ValueError, match="bias must be of shape .* got .*; pass the layer's own"):
            checks.shape("bias", got, expected, "pass the layer's own")


def test_last_dimension_needs_vectors_of_the_right_length() -> None:
    checks.last_dimension(torch.zeros(2, 3, 7), 7)
    for x in (torch.zeros(7, 2), torch.zeros(())):
        with pytest.raises(ValueError, match=r"x must be of shape \(\*batch, 7\)"):
            checks.last_dimension(x, 7)


def test_tensor_names_tells_missing_from_surplus() -> None:
    checks.tensor_names(["right", "left"], ["left", "right"], "LowRank")
    with pytest.raises(ValueError, match="missing: left; surplus: middle"):
        checks.tensor_names(["right", "middle"], ["left", "right"], "LowRank")
