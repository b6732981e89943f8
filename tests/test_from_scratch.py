"""Training from a random start, choosing the learning rate, and changed images."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.examples import Example, each_example
from tests.test_training import assert_same, batches
from weft.measure import accuracy
from weft.schemes.checkpoint import read_state
from weft.schemes.data_order import order_of, restore_order
from weft.schemes.fine_tune import FineTune, fine_tune
from weft.schemes.from_scratch import FromScratch, from_scratch
from weft.schemes.learning_rate import choose_learning_rate
from weft.schemes.training import Training
from weft.sources.augmentation import Augmented
from weft.structures.low_rank import LowRank
from weft.structures.semiseparable import SequentiallySemiseparable
from weft.structures.sparse_product import SparseProduct


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


PLAN = {"0": LowRank(3), "3": SparseProduct(2, 3)}


@pytest.mark.parametrize("start", ["random", "supports"])
def test_every_layer_starts_at_random_and_the_given_network_is_left_alone(start: str) -> None:
    model = network()
    model[1].running_mean.fill_(7.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scheme = FromScratch(FineTune.of(seed=4), start)
    state = torch.get_rng_state()
    one, two = scheme.initialise(model, PLAN), scheme.initialise(model, PLAN)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(one, two)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert one[0].matrix.structure == PLAN["0"]
    assert not torch.equal(one[5].weight, model[5].weight)
    assert float(one[1].running_mean.abs().max()) == 0
    for name, structure in PLAN.items():
        fitted = structure.fit(model.get_submodule(name).weight.detach())
        assert not torch.allclose(one.get_submodule(name).matrix.to_dense(), fitted.to_dense(), atol=1e-2)
    kept = {name: buffer for name, buffer in PLAN["3"].fit(model[3].weight.detach()).named_buffers()}
    same = [torch.equal(one[3].matrix.get_buffer(name), kept[name]) for name in ("columns", "counts")]
    assert all(same) == (start == "supports")
    other = FromScratch(FineTune.of(seed=5), start).initialise(model, PLAN)
    assert not torch.equal(one[5].weight, other[5].weight)


def test_frozen_layers_and_ties_stay() -> None:
    model = network()
    model[5].requires_grad_(False)
    tied = nn.Sequential(*model, nn.Linear(3, 16), nn.Linear(16, 16))
    tied[7].weight = tied[3].weight
    start = FromScratch(start="supports").initialise(tied, PLAN)
    assert torch.equal(start[5].weight, model[5].weight)
    assert start[7].matrix is start[3].matrix
    assert start[7].bias is not start[3].bias
    assert FromScratch().initialise(tied, PLAN)[7].matrix is not None


@pytest.mark.parametrize("start", ["random", "supports"])
def test_it_learns_from_scratch_and_goes_on_after_an_interruption(tmp_path: Any, start: str) -> None:
    data = batches(8, 40)
    options: dict[str, Any] = {"start": start, "epochs": 30, "learning_rate": 1e-2}
    small, log = from_scratch(network(), PLAN, data, checkpoint=tmp_path / start, **options)
    assert accuracy(small, data) > 0.85
    again, _ = from_scratch(network(), PLAN, data, checkpoint=tmp_path / start, **options)
    assert_same(small, again)
    other = {"random": "supports", "supports": "random"}[start]
    with pytest.raises(ValueError, match=f"start '{start}' there"):
        from_scratch(network(), PLAN, data, checkpoint=tmp_path / start, **{**options, "start": other})
    with pytest.raises(ValueError, match="start must be one of 'random', 'supports', got 'zero'"):
        from_scratch(network(), PLAN, data, start="zero")


@each_example
def test_reinitialised_members_keep_pattern_and_size(example: Example) -> None:
    torch.manual_seed(0)
    member = example.structure((24, 20)).fit(torch.randn(24, 20))
    generator = torch.Generator().manual_seed(7)
    drawn = member.reinitialise(generator=generator)
    if member.relax() is member:
        assert drawn.structure == member.structure
        for name, buffer in member.named_buffers():
            if not buffer.is_floating_point():
                assert torch.equal(buffer, drawn.get_buffer(name)), name
        assert drawn.cost() == member.cost()
    x = torch.randn(4000, 20)
    sizes = [float(each(x).detach().std()) for each in (member, drawn)]
    assert 0.1 < sizes[1] / sizes[0] < 10
    assert not torch.allclose(member.to_dense(), drawn.to_dense(), atol=1e-3)


# ------------------------------------------------------------------------------------------------------------
# Backpropagation through states


def test_gradients_of_semiseparable_layers_go_back_through_the_states() -> None:
    """The backward recurrences of Kissel and Diepold 2022, written out, against what training computes."""
    generator = torch.Generator().manual_seed(0)
    structure = SequentiallySemiseparable(4, 3)
    member = structure.initialise((10, 13), dtype=torch.float64, generator=generator)
    x, seen = (torch.randn(5, size, generator=generator, dtype=torch.float64) for size in (13, 10))
    member(x).backward(seen)
    roles = {role.name: role for role in structure.roles((10, 13)) or ()}

    def blocks(values: Tensor, name: str) -> list[Tensor]:
        """The matrices of one role, (rows, columns) per stage."""
        sizes = [rows * columns for rows, columns in roles[name].shapes]
        return [
            part.reshape(columns, rows).T
            for part, (rows, columns) in zip(values.split(sizes), roles[name].shapes, strict=True)
        ]

    stored = dict(member.named_parameters())
    weights = {name: blocks(value.detach(), name) for name, value in stored.items()}
    u = x.split([shape[1] for shape in roles["direct"].shapes], 1)
    e = seen.split([shape[0] for shape in roles["direct"].shapes], 1)
    expected: dict[str, list[Tensor]] = {name: [torch.empty(0)] * 4 for name in stored}
    states = [x.new_zeros(5, 0)]
    for k in range(4):
        states.append(states[k] @ weights["causal_transition"][k].T + u[k] @ weights["causal_input"][k].T)
    adjoint = x.new_zeros(5, 0)  # of the state after the last stage
    for k in reversed(range(4)):
        expected["causal_transition"][k] = adjoint.T @ states[k]
        expected["causal_input"][k] = adjoint.T @ u[k]
        expected["causal_output"][k] = e[k].T @ states[k]
        expected["direct"][k] = e[k].T @ u[k]
        adjoint = adjoint @ weights["causal_transition"][k] + e[k] @ weights["causal_output"][k]
    states = [x.new_zeros(5, 0)] * 5
    for k in reversed(range(4)):  # states[k + 1] enters stage k from behind
        entering = states[k + 1]
        states[k] = entering @ weights["anticausal_transition"][k].T + u[k] @ weights["anticausal_input"][k].T
    adjoint = x.new_zeros(5, 0)
    for k in range(4):
        expected["anticausal_transition"][k] = adjoint.T @ states[k + 1]
        expected["anticausal_input"][k] = adjoint.T @ u[k]
        expected["anticausal_output"][k] = e[k].T @ states[k + 1]
        adjoint = adjoint @ weights["anticausal_transition"][k] + e[k] @ weights["anticausal_output"][k]
    assert stored.keys() == expected.keys()
    for name, value in stored.items():
        assert value.grad is not None
        for got, wanted in zip(blocks(value.grad, name), expected[name], strict=True):
            torch.testing.assert_close(got, wanted.reshape(got.shape), msg=name)


# ------------------------------------------------------------------------------------------------------------
# The learning rate


def test_the_learning_rate_is_chosen_by_a_few_steps_from_the_same_start() -> None:
    model = nn.Linear(8, 3)
    before = model.weight.detach().clone()
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*batches(), strict=True))),
        batch_size=10,
        shuffle=True,
        generator=torch.Generator().manual_seed(1),
    )
    order, seen = order_of(data), []
    first = next(iter(data))[0]
    restore_order(data, order)

    def metric(trial: nn.Module) -> float:
        seen.append(trial.weight.detach().clone())
        moved = float((trial.weight - before).abs().max().detach())
        return -abs(moved - 0.1)  # with Adam, ten steps move a weight by ten times the rate

    chosen = choose_learning_rate(
        Training(epochs=50, schedule="constant", optimiser="adam"),
        model,
        data,
        (1e-3, 1e-2, 1e-1),
        validation=metric,
        steps=10,
    )
    assert chosen.learning_rate == 1e-2
    assert chosen.epochs == 50
    assert torch.equal(model.weight, before)
    assert len(seen) == 3
    assert torch.equal(next(iter(data))[0], first)  # as if it had not been tried


def test_a_rate_that_diverges_loses_and_the_chosen_one_is_kept_with_the_checkpoint(tmp_path: Any) -> None:
    data = batches()
    options: dict[str, Any] = {
        "optimiser": "rmsprop",
        "rates": (1e38, 1e-2),
        "validation": data,
        "epochs": 20,
    }
    tuned, log = fine_tune(nn.Linear(8, 3), data, checkpoint=tmp_path / "run", **options)
    assert accuracy(tuned, data) > 0.8
    assert len([entry for entry in log if "loss" in entry]) == 120  # the trials are not in it
    state = read_state(tmp_path / "run" / "checkpoint.safetensors")
    assert state["outer"] == {"learning_rate": 1e-2}
    with pytest.raises(ValueError, match="rates must be such that one does not diverge"):
        fine_tune(nn.Linear(8, 3), data, **{**options, "rates": (1e38,)})
    with pytest.raises(ValueError, match="validation must be given with rates"):
        fine_tune(nn.Linear(8, 3), data, rates=(1e-3,))
    with pytest.raises(ValueError, match="optimiser must be a name where rates are given"):
        fine_tune(nn.Linear(8, 3), data, **{**options, "optimiser": torch.optim.Adam})


# ------------------------------------------------------------------------------------------------------------
# Changed images


def test_shifts_turns_and_mirrors_are_those_of_the_definition() -> None:
    images = torch.rand(64, 2, 7, 9)
    data = [(images, torch.arange(64))]

    def first(**options: Any) -> Tensor:
        changed, labels = next(iter(Augmented(data, **options)))
        assert torch.equal(labels, torch.arange(64))
        return changed

    torch.testing.assert_close(first(), images, rtol=0, atol=1e-5)
    mirrored = first(flip=True)
    kinds = [
        int(torch.allclose(now, was, atol=1e-5)) - int(torch.allclose(now, was.flip(-1), atol=1e-5))
        for now, was in zip(mirrored, images, strict=True)
    ]
    assert set(kinds) == {1, -1}
    assert 16 < kinds.count(-1) < 48
    square = torch.zeros(200, 1, 21, 21)
    square[:, :, 10, 16] = 1.0  # a point six pixels to the right of the centre
    turned, _ = next(iter(Augmented([(square, torch.zeros(200))], rotation=30.0)))
    at = [
        (
            float((turned[i, 0] * torch.arange(21.0)[:, None]).sum() / turned[i, 0].sum()) - 10,
            float((turned[i, 0] * torch.arange(21.0)).sum() / turned[i, 0].sum()) - 10,
        )
        for i in range(200)
    ]
    angles = [math.degrees(math.atan2(row, column)) for row, column in at]
    assert all(math.hypot(*place) == pytest.approx(6, abs=0.3) for place in at)
    assert max(map(abs, angles)) <= 31
    assert max(angles) > 25
    assert min(angles) < -25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flip", [False, True])
def test_a_shift_moves_whole_pixels_and_changes_none(dtype: torch.dtype, flip: bool) -> None:
    height, width, most = 40, 300, 2
    images = torch.rand(500, 1, height, width).to(dtype)
    padded = torch.nn.functional.pad(images, (most,) * 4)
    shifted, _ = next(iter(Augmented([(images, torch.zeros(500))], shift=most, flip=flip)))
    assert shifted.dtype == dtype
    seen: dict[tuple[int, int], int] = {}
    for image, moved in zip(padded, shifted, strict=True):
        crops = {
            (down, along): image[:, most + down :, most + along :][:, :height, :width]
            for down in range(-most, most + 1)
            for along in range(-most, most + 1)
        }
        mirrored = [moved, moved.flip(-1)] if flip else [moved]
        (shift,) = [place for place, crop in crops.items() if any(torch.equal(crop, one) for one in mirrored)]
        seen[shift] = seen.get(shift, 0) + 1
    assert len(seen) == (2 * most + 1) ** 2
    assert min(seen.values()) > 4
    assert max(seen.values()) < 50


@given(st.integers(0, 5), st.integers(0, 100))
@settings(deadline=None, max_examples=20)
def test_changed_images_follow_from_seed_and_pass(passes: int, seed: int) -> None:
    data = [(torch.rand(3, 1, 6, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(3))] * 2
    one = Augmented(data, shift=1, rotation=20, flip=True, seed=seed)
    seen = [[x for x, _ in one] for _ in range(passes + 1)]
    two = Augmented(data, shift=1, rotation=20, flip=True, seed=seed)
    restore_order(two, [passes])
    assert all(torch.equal(a, b) for a, b in zip(seen[-1], [x for x, _ in two], strict=True))
    assert not torch.equal(seen[-1][0], seen[-1][1])
    for before, after in itertools.pairwise(seen):
        assert not torch.equal(before[0], after[0])


def test_what_cannot_be_changed_is_refused() -> None:
    with pytest.raises(ValueError, match="inputs must be floating images"):
        next(iter(Augmented([(torch.zeros(3, 4), torch.zeros(3))], flip=True)))
    with pytest.raises(ValueError, match="shift must be at least 0, got -1"):
        Augmented([], shift=-1)
    with pytest.raises(TypeError, match=r"shift must be a whole number at least 0, got 0\.5"):
        Augmented([], shift=0.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="rotation must be at least 0, got -1"):
        Augmented([], rotation=-1)
    for text in ("zoom=3", "shift", "shift=a", "shift=0.5", "rotation", "flip=maybe", ""):
        with pytest.raises(ValueError, match="augment must be such as shift=2,rotation=10,flip"):
            Augmented.parse([], text)
    made = Augmented.parse([], "shift=2, rotation=10,flip")
    assert (made.shift, made.rotation, made.flip) == (2, 10, True)
