"""Direct compression, its corrections, and fine-tuning."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weft
from weft.measure import accuracy, network_cost
from weft.plan.budget import Budget
from weft.schemes.corrections import bias_correction, correct_batch_norm
from weft.schemes.direct import compress
from weft.schemes.fine_tune import fine_tune
from weft.schemes.search import search
from weft.schemes.sequential import bias_shift, execution_order, sequential_target
from weft.schemes.training import Training
from weft.structures.base import Structure, relative_error
from weft.structures.dense import Dense
from weft.structures.low_rank import LowRank
from weft.structures.quantized import Quantized
from weft.survey import find_layers, patches


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8 * 16, 5),
    )
    for _ in range(20):  # running statistics that mean something
        model(images(seed=int(torch.randint(1000, ()))))
    return model.eval()


def images(count: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 6, 6, generator=generator) + 0.5


PLAN: dict[str, Structure] = {"0": LowRank(2), "3": LowRank(2), "8": LowRank(1)}


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "grads": {name: parameter.grad for name, parameter in model.named_parameters()},
        "frozen": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "modules": [id(module) for module in model.modules()],
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert all(torch.equal(tensor, after["state"][name]) for name, tensor in before["state"].items())
    for key in before.keys() - {"state"}:
        assert before[key] == after[key], key


# ------------------------------------------------------------------------------------------------------------
# Direct


def test_compress_fits_every_planned_layer_and_touches_nothing_else() -> None:
    model = network()
    model[4].train()
    model[8].weight.grad = torch.ones(5, 128)
    before = snapshot(model)
    found = weft.survey(model, [images()], teacher=model)
    small, log = compress(model, PLAN, found, batches=[images()])
    assert_untouched(model, before)
    assert [entry["layer"] for entry in log] == list(PLAN)
    for entry in log:
        layer, matrix = found.layers[entry["layer"]], small.get_submodule(entry["layer"]).matrix
        grams = {"input_gram": layer.input_gram, "output_gram": layer.output_gram}
        assert entry["error"] == pytest.approx(relative_error(layer.weight, matrix.to_dense(), **grams))
        assert entry["structure"] == PLAN[entry["layer"]].to_json()
        assert entry["parameters"] == matrix.cost().parameters
        assert entry["seconds"] > 0
    assert not {tensor.data_ptr() for tensor in small.state_dict().values()} & {
        tensor.data_ptr() for tensor in model.state_dict().values()
    }
    assert {
        name: module.training for name, module in small.named_modules() if "matrix" not in name
    } == before["modes"]


def test_dense_entries_and_unnamed_layers_stay_as_they_are() -> None:
    model = network()
    small, log = compress(model, {"0": Dense(), "8": LowRank(2)})
    assert type(small[0]) is nn.Conv2d
    assert type(small[3]) is nn.Conv2d
    assert torch.equal(small[0].weight, model[0].weight)
    assert [entry["layer"] for entry in log] == ["8"]


def test_an_empty_plan_gives_a_copy() -> None:
    model = network()
    small, log = compress(model, {})
    assert log == []
    assert small is not model
    assert torch.equal(small(images()), model(images()))


def test_the_models_own_weights_are_fitted_also_when_the_survey_saw_others() -> None:
    model, other = network(), network()
    with torch.no_grad():
        other[8].weight.mul_(-2)
    small, _ = compress(other, {"8": LowRank(5)}, weft.survey(model, [images()]))
    torch.testing.assert_close(
        small[8].weight, other[8].weight.detach(), rtol=1e-4, atol=1e-5, check_dtype=True
    )


def test_fits_repeat_and_follow_their_generator() -> None:
    model = network()
    plan = {"8": LowRank(2, "randomized")}
    first, second = (compress(model, plan).model[8].weight for _ in range(2))
    assert torch.equal(first, second)
    seeded = [
        compress(model, plan, generator=torch.Generator().manual_seed(3)).model[8].weight for _ in range(2)
    ]
    assert torch.equal(*seeded)


def test_a_weighted_compression_loses_less_output_than_a_plain_one() -> None:
    model = network()
    data = [images(256)]
    found = weft.survey(model, data)
    lost = {}
    for name, survey in (("plain", None), ("weighted", found)):
        small, _ = compress(model, {"8": LowRank(1)}, survey, correct_biases=False)
        lost[name] = float((small(data[0]) - model(data[0])).square().mean())
    assert lost["weighted"] < lost["plain"]


# ------------------------------------------------------------------------------------------------------------
# Bias correction


@given(st.integers(0, 20), st.integers(1, 4), st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=25)
def test_corrected_biases_restore_the_mean_output(seed: int, rank: int, groups: int) -> None:
    torch.manual_seed(seed)
    x = torch.rand(20, 8, 7, 6, dtype=torch.float64) + torch.arange(8, dtype=torch.float64)[:, None, None]
    convolution = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=groups, dtype=torch.float64)
    linear = nn.Linear(6, 8, dtype=torch.float64)
    for model, axes in ((convolution, (0, 2, 3)), (linear, (0, 1, 2))):
        found = weft.survey(model, [x])
        rough, _ = compress(model, {"": LowRank(rank)}, found, correct_biases=False)
        small, _ = compress(model, {"": LowRank(rank)}, found)
        expected = model(x).mean(axes)
        torch.testing.assert_close(small(x).mean(axes), expected, rtol=1e-5, atol=1e-5)
        assert float((small(x) - model(x)).norm()) <= float((rough(x) - model(x)).norm()) + 1e-9


def test_without_data_or_bias_nothing_is_corrected() -> None:
    model = network()
    found = weft.survey(model)
    matrix = LowRank(1).fit(model[8].weight)
    assert bias_correction(found.layers["8"], matrix) is None
    small, _ = compress(model, PLAN, found)
    assert torch.equal(small[8].bias, model[8].bias)
    small, _ = compress(model, PLAN, weft.survey(model, [images()]))
    assert small[3].bias is None
    assert not torch.equal(small[8].bias, model[8].bias)


def test_a_bias_shared_by_two_layers_is_corrected_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    x = torch.rand(50, 6)
    found = weft.survey(model, [x])
    small, _ = compress(model, {"0": LowRank(1)}, found)
    shift = bias_correction(found.layers["0"], small[0].matrix)
    assert shift is not None
    assert small[0].bias is small[1].bias
    torch.testing.assert_close(small[0].bias.detach(), (model[0].bias + shift).detach().float())


# ------------------------------------------------------------------------------------------------------------
# Batch-norm correction


def test_an_unchanged_network_keeps_its_statistics_bitwise() -> None:
    model = network()
    again = copy.deepcopy(model)
    assert correct_batch_norm(again, model, [images(8), images(5, seed=1)]) == 2
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_shifted_input_shifts_the_mean_exactly() -> None:
    model = network()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].bias += 0.7
    correct_batch_norm(changed, model, [images(64), images(64, seed=1)])
    with torch.no_grad():
        x = images(64, seed=5)
        torch.testing.assert_close(changed(x), model(x), rtol=1e-3, atol=1e-3)


def test_a_scaled_input_scales_the_deviation_by_the_square_root() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight *= 4
        changed[0].bias *= 4
    x = torch.randn(500, 4)
    correct_batch_norm(changed, model, [x])
    mean = model[0](x).mean(0).detach()
    torch.testing.assert_close(changed[1].running_var, torch.full((4,), 4.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(changed[1].running_mean, 4 * mean + 2 * (0 - mean), rtol=1e-4, atol=1e-4)


def test_corrected_statistics_bring_a_compressed_network_nearer() -> None:
    model = network()
    data = [images(128, seed=seed) for seed in range(2)]
    found = weft.survey(model, data)
    lost = []
    for batches in (None, data):
        plan: dict[str, Structure] = {"0": LowRank(3), "3": LowRank(3)}
        small, _ = compress(model, plan, found, batches=batches, correct_biases=False)
        lost.append(float((small(images(128, seed=9)) - model(images(128, seed=9))).square().mean()))
    assert lost[1] < lost[0]


def test_a_batch_norm_in_two_places_is_corrected_call_by_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(5 * self.norm(self.layer(x)) + 3)

    model = Twice().eval()
    again = copy.deepcopy(model)
    correct_batch_norm(again, model, [torch.randn(16, 4)])
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_constant_channels_keep_their_variance() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight[1] = 0
    correct_batch_norm(changed, model, [torch.randn(16, 4)])
    assert torch.isfinite(changed[1].running_var).all()
    assert changed[1].running_var[1] == 1


def test_a_correction_leaves_no_hooks_and_its_own_modes_even_after_an_error() -> None:
    model, small = network(), network()
    model[1].train()

    def breaking() -> Iterator[Tensor]:
        yield images(4)
        raise OSError("the disk went away")

    before = snapshot(model)
    with pytest.raises(OSError, match="the disk went away"):
        correct_batch_norm(small, model, breaking())
    assert_untouched(model, before)
    assert not any(module._forward_pre_hooks for module in small.modules())
    assert not any(module.training for module in small.modules())


def test_data_for_the_correction_must_hold_samples() -> None:
    model = network()
    for batches in ([], [images(0)], iter([])):
        with pytest.raises(ValueError, match="batches must be not empty, got no samples"):
            compress(model, PLAN, batches=batches)
    with pytest.raises(TypeError, match=r"pass weft\.inputs\(batches\)"):
        compress(model, PLAN, batches=[(images(), torch.zeros(32).long())])
    plain = correct_batch_norm(network(), model, [images(4)])
    assert correct_batch_norm(network(), model, [images(0), images(4)]) == plain
    assert correct_batch_norm(nn.Linear(2, 2), nn.Linear(2, 2), []) == 0


# ------------------------------------------------------------------------------------------------------------
# Fine-tuning


def labelled_batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    model = network()
    with torch.no_grad():
        return [(images(seed=seed), model(images(seed=seed)).argmax(-1)) for seed in range(count)]


@pytest.mark.parametrize("with_teacher", [False, True])
def test_fine_tuning_reduces_the_loss_and_changes_only_a_copy(with_teacher: bool) -> None:
    model = network()
    small, _ = compress(model, PLAN)
    small[4].train()
    before, before_teacher = snapshot(small), snapshot(model)
    tuned, log = fine_tune(
        small, labelled_batches(), teacher=model if with_teacher else None, epochs=10, learning_rate=1e-2
    )
    assert_untouched(small, before)
    assert_untouched(model, before_teacher)
    assert [(entry["step"], entry["epoch"]) for entry in log] == [(step, step // 4) for step in range(40)]
    assert all(math.isfinite(entry["loss"]) for entry in log)
    assert all(one["seconds"] <= two["seconds"] for one, two in zip(log, log[1:], strict=False))
    assert sum(entry["loss"] for entry in log[-4:]) < 0.8 * sum(entry["loss"] for entry in log[:4])
    assert {name: module.training for name, module in tuned.named_modules()} == before["modes"]
    assert [type(module) for module in tuned.modules()] == [type(module) for module in small.modules()]
    assert tuned[0].matrix.structure == small[0].matrix.structure


def test_a_teacher_needs_no_labels() -> None:
    model = network()
    small, _ = compress(model, PLAN)
    with_labels = fine_tune(small, [(images(), torch.zeros(32).long())], teacher=model).log[0]["loss"]
    torch.manual_seed(0)
    tuned, log = fine_tune(
        small, [images(seed=seed) for seed in range(3)], teacher=model, epochs=6, learning_rate=1e-2
    )
    assert log[-1]["loss"] < log[0]["loss"]
    assert with_labels > 0
    assert tuned is not small


def test_a_student_equal_to_its_teacher_has_no_loss() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 5))
    log = fine_tune(model, [images()], teacher=model).log
    assert log[0]["loss"] == pytest.approx(0.0, abs=1e-6)


def test_the_losses_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    teacher, student = nn.Linear(6, 5), nn.Linear(6, 5)
    x, labels = torch.randn(7, 6), torch.arange(7) % 5
    scores, target = student(x).detach().double(), teacher(x).detach().double()
    supervised = -scores.log_softmax(-1)[torch.arange(7), labels].mean()
    chances = (target / 3).softmax(-1)
    divergence = (chances * (chances.log() - (scores / 3).log_softmax(-1))).sum(-1).mean() * 9
    for options, expected in (
        ({}, supervised),
        ({"teacher": teacher, "temperature": 3.0}, divergence),
        (
            {"teacher": teacher, "temperature": 3.0, "label_share": 0.25},
            0.75 * divergence + 0.25 * supervised,
        ),
        ({"loss": F.multi_margin_loss}, F.multi_margin_loss(scores, labels)),
    ):
        log = fine_tune(student, [(x, labels)], **options).log
        assert log[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_of_ones_own_takes_targets_that_are_no_labels() -> None:
    student = nn.Linear(6, 2)
    batches = [(torch.randn(9, 6), torch.randn(9, 2))]
    log = fine_tune(student, batches, loss=F.mse_loss, epochs=20, learning_rate=1e-1).log
    assert log[-1]["loss"] < log[0]["loss"]
    with pytest.raises(ValueError, match=r"floating targets must be of shape \(9, 2\), got \(9,\)"):
        fine_tune(student, [(batches[0][0], torch.randn(9))])


def test_regressions_learn_from_targets_and_teachers() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    for outputs in (1, 3):
        teacher, student = nn.Linear(6, outputs), nn.Linear(6, outputs)
        y = teacher(x).detach() + 0.1
        target, own = teacher(x).detach(), student(x).detach()
        apart = float((own - target).square().mean())
        squared = float((own - y).square().mean())
        log = fine_tune(student, [(x, y)]).log
        assert log[0]["loss"] == pytest.approx(squared, rel=1e-5)
        for batch in (x, (x, y)) if outputs == 1 else ((x, y),):
            log = fine_tune(student, [batch], teacher=teacher, epochs=200, learning_rate=1e-1).log
            assert log[0]["loss"] == pytest.approx(apart, rel=1e-5)
            assert log[-1]["loss"] < 1e-2 * apart
        log = fine_tune(student, [(x, y)], teacher=teacher, label_share=0.25, validation=[(x, y)]).log
        assert log[0]["loss"] == pytest.approx(0.75 * apart + 0.25 * squared, rel=1e-5)
        assert log[-1]["metric"] < 1


def test_the_classes_of_images_are_on_axis_1_for_labels_and_teachers() -> None:
    torch.manual_seed(0)
    teacher, student = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1)
    x = torch.randn(3, 2, 5, 6)
    target, own = teacher(x).detach(), student(x).detach()
    labels = target.argmax(1)
    log = fine_tune(student, [(x, labels)]).log
    assert log[0]["loss"] == pytest.approx(float(F.cross_entropy(own, labels)), rel=1e-5)
    wanted = F.kl_div(
        (own / 2).log_softmax(1), (target / 2).log_softmax(1), log_target=True, reduction="none"
    )
    expected = float(4 * wanted.sum(1).mean())
    for batch in (x, (x, labels)):
        log = fine_tune(student, [batch], teacher=teacher).log
        assert log[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_learning_rate_falls_by_a_half_cosine_and_the_optimiser_may_be_ones_own() -> None:
    made: list[torch.optim.Optimizer] = []

    class Recording(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    rates: list[float] = []

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(Recording(parameters, lr=0.4))
        return made[-1]

    fine_tune(
        nn.Linear(108, 5), [(images().flatten(1), torch.zeros(32).long())] * 2, epochs=2, optimiser=make
    )
    assert rates == pytest.approx([0.4 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])


def test_frozen_weights_do_not_move() -> None:
    model = network()
    model[8].weight.requires_grad_(False)
    small, _ = compress(model, PLAN)
    tuned, _ = fine_tune(small, labelled_batches(1), learning_rate=1e-1)
    for name, parameter in tuned.named_parameters():
        assert torch.equal(parameter, small.get_parameter(name)) == (not parameter.requires_grad), name
    assert not tuned[8].matrix.left.requires_grad


def test_tied_weights_stay_tied_through_compression_fine_tuning_and_the_file(tmp_path: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))

    torch.manual_seed(0)
    model = Tied()
    batches = [(torch.randn(32, 12), torch.randint(3, (32,))) for _ in range(2)]
    found = weft.survey(model, weft.inputs(batches))
    small, _ = compress(model, {"one": LowRank(2)}, found)
    tuned, _ = fine_tune(small, batches, learning_rate=1e-2)
    path = weft.save(tuned, tmp_path / "tuned.safetensors")
    loaded = weft.load(path, model=model)
    for network_ in (small, tuned, loaded):
        assert network_.one.matrix is network_.two.matrix
        assert network_.one.bias is not network_.two.bias
    assert not torch.equal(tuned.one.matrix.left, small.one.matrix.left)
    assert torch.equal(loaded(batches[0][0]), tuned(batches[0][0]))


def test_modes_come_back_when_training_breaks_off() -> None:
    model = network()
    small, _ = compress(model, PLAN)
    before, before_teacher = snapshot(small), snapshot(model)
    bad = images()
    bad[0] = math.nan
    with pytest.raises(
        ValueError,
        match=r"loss must be finite, got nan at step 1, in the batch itself \(first used by layer '0'\); "
        r"lower the learning rate \(0\.001\)",
    ):
        fine_tune(small, [images(), bad], teacher=model)
    assert_untouched(small, before)
    assert_untouched(model, before_teacher)


def test_data_without_batches_are_refused() -> None:
    model = network()
    for batches in ([], [(images(0), torch.zeros(0).long())]):
        with pytest.raises(ValueError, match="batches must be not empty, got no batches in epoch 1"):
            fine_tune(model, batches)
    with pytest.raises(ValueError, match="batches must be not empty, got no batches in epoch 2"):
        fine_tune(model, iter(labelled_batches()), epochs=2)
    assert len(fine_tune(model, (batch for batch in labelled_batches())).log) == 4


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(
        ValueError, match="model must be one with weights to train, got none that requires a gradient"
    ):
        fine_tune(network().requires_grad_(False), labelled_batches())
    with pytest.raises(TypeError, match=r"data must be an iterable of \(inputs, labels\) pairs"):
        fine_tune(network(), [images()])
    with pytest.raises(TypeError, match=r"data must be an iterable of \(inputs, labels\) pairs"):
        fine_tune(network(), [images()], teacher=network(), label_share=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number above 0"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"label_share": 1.5}, "label_share must be a share from 0 and at most 1"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training.of(**options)


def test_rows_that_are_looked_up_often_are_fitted_better() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 16), nn.Flatten(), nn.Linear(16, 3))
    often = torch.randint(8, (400, 1))
    rarely = torch.arange(40)[:, None]
    found = weft.survey(model, [torch.cat([often, rarely])], shown=False)
    small = weft.compress(model, {"0": LowRank(4)}, found).model
    plain = weft.compress(model, {"0": LowRank(4)}).model
    with torch.no_grad():
        errors = [(net[0](often) - model[0](often)).norm() for net in (small, plain)]
    assert errors[0] < 0.8 * errors[1]


# ------------------------------------------------------------------------------------------------------------
# Sequential fitting


def test_sequential_fitting_meets_the_dense_output_better() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(24, 24), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(24, 8))
    data = [torch.randn(400, 24) @ torch.randn(24, 24) for _ in range(2)]
    found = weft.survey(model, data)
    plan = {name: LowRank(6) for name in found.layers}
    lost = {}
    for sequential in (False, True):
        small, log = compress(model, plan, found, batches=data, sequential=sequential)
        with torch.no_grad():
            lost[sequential] = sum(float((small(x) - model(x)).square().mean()) for x in data)
        assert [entry["layer"] for entry in log] == list(plan)
    assert lost[True] < 0.9 * lost[False]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_sequential_target_is_the_least_squares_solution(groups: int) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 2, groups=groups)).double()
    small = copy.deepcopy(dense)
    with torch.no_grad():
        small[0].weight += 0.3 * torch.randn_like(small[0].weight)
    x = torch.randn(20, 4, 5, 5, dtype=torch.float64)
    layer = weft.survey(dense, [x]).layers["2"]
    target = sequential_target(dense, small, layer, [x[:7], x[7:]], calls=1, shrinkage=0.0)
    assert target is not None
    assert layer.geometry is not None
    with torch.no_grad():
        exact, reached = (patches(net[1](net[0](x)), (2, 2), layer.geometry) for net in (dense, small))
        weight = layer.weight.flatten(1).reshape(groups, -1, exact.shape[-1])
        wanted = exact @ weight.mT
        centred = reached - reached.mean(1, keepdim=True)
        solution = torch.linalg.lstsq(centred, wanted - wanted.mean(1, keepdim=True)).solution.mT
        fitted = target.weight.reshape(solution.shape)
        torch.testing.assert_close(fitted, solution, rtol=1e-6, atol=1e-8)
        # With that weight and the shifted bias the mean output is that of the dense network.
        shift = bias_shift(layer, target.weight, target)
        output = (reached @ fitted.mT).mean(1).reshape(-1) + shift
        torch.testing.assert_close(output, wanted.mean(1).reshape(-1))


def test_layers_are_fitted_in_the_order_in_which_they_run() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(self.first(x)))

    model = Backwards()
    layers = find_layers(model)[0].values()
    assert execution_order(model, layers, torch.zeros(1, 4)) == {"first": 2, "last": 1, "unused": 0}
    assert list(execution_order(model, layers, torch.zeros(1, 4))) == ["first", "last", "unused"]


def test_sequential_fitting_takes_tables_and_shared_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[3].weight = model[1].weight
    data = [torch.randint(9, (40, 3))]
    found = weft.survey(model, data)
    small, _ = compress(model, {"0": LowRank(5), "1": LowRank(5)}, found, batches=data, sequential=True)
    assert small[1].matrix is small[3].matrix
    assert float((small(data[0]) - model(data[0])).square().mean()) < 0.05


def test_sequential_fitting_needs_batches_more_than_once() -> None:
    model = network()
    with pytest.raises(ValueError, match="batches must be given with sequential, got None"):
        compress(model, PLAN, sequential=True)
    with pytest.raises(TypeError, match="batches must be iterable more than once"):
        compress(model, PLAN, batches=iter([images()]), sequential=True)


@pytest.mark.parametrize("structure", [LowRank(5), Quantized(4)], ids=str)
def test_autocast_around_changes_no_fit(structure: Structure) -> None:
    """Products in half precision are for the network that the caller runs, not for sums and fits."""
    torch.manual_seed(0)
    model, x = nn.Linear(40, 30), torch.randn(64, 40)
    plain = weft.survey(model, [x])
    expected = compress(model, {"": structure}, plain).model.matrix.to_dense()
    with torch.autocast("cpu", torch.bfloat16):
        found = weft.survey(model, [x])
        assert torch.equal(found.layers[""].input_gram.moment, plain.layers[""].input_gram.moment)
        small = compress(model, {"": structure}, found).model
        plan = weft.allocate(found, [type(structure)], Budget(bytes=0.5))
    assert torch.equal(small.matrix.to_dense(), expected)
    assert (
        plan.expected[""].error
        == weft.allocate(plain, [type(structure)], Budget(bytes=0.5)).expected[""].error
    )


# ------------------------------------------------------------------------------------------------------------
# Search


def classifier() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """A network with classes of its own making, on inputs of few directions, so that it can be compressed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 5))
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(48, 6) @ torch.randn(6, 48) / 12)
    x = torch.randn(600, 10) @ torch.randn(10, 32)
    return model, [(x, model(x).argmax(-1))]


@pytest.mark.parametrize("minimise", ["bytes", "parameters", "multiply_adds"])
def test_a_search_keeps_its_promise_and_is_smaller(minimise: str) -> None:
    model, data = classifier()
    found = weft.survey(model, [data[0][0]])
    seen = [(data[0][0][:300], data[0][1][:300])]

    def evaluate(network: nn.Module) -> float:
        return accuracy(network, seen)

    result = search(
        model, found, "LowRank", Budget(keep=0.8), evaluate=evaluate, batches=[data[0][0]], minimise=minimise
    )
    assert result.dense_value == 1
    assert result.value == evaluate(result.model) >= 0.9  # half of the allowed loss stays unused
    assert getattr(network_cost(result.model, data[0][0]), minimise) < 0.8 * getattr(found.total, minimise)
    enough = [step["share"] for step in result.log if step["enough"]]
    assert result.plan.budget == Budget(keep=0.8)
    # The last step that was enough is the smallest, and one that was not is just below.
    assert min(enough) == enough[-1]
    missed = [step["share"] for step in result.log if not step["enough"]]
    assert max(missed, default=0) == pytest.approx(min(enough), abs=2**-6)


def test_a_search_holds_absolute_limits_on_what_it_minimises() -> None:
    """With a loose promise every share down to the smallest is tried: none may exceed the other limit."""
    model, data = classifier()
    found = weft.survey(model, [data[0][0]])
    limit = round(0.6 * found.total.bytes)
    costs: list[int] = []

    def evaluate(network: nn.Module) -> float:
        costs.append(network_cost(network).bytes)
        return 1.0 if costs[-1] > 0.55 * found.total.bytes else 0.1

    result = search(model, found, "LowRank", Budget(keep=0.9, bytes=limit), evaluate=evaluate)
    assert max(costs[1:]) <= limit
    assert network_cost(result.model).bytes <= limit


def test_what_cannot_be_made_smaller_stays_dense() -> None:
    model, data = classifier()
    result = search(
        model,
        weft.survey(model),
        "LowRank",
        Budget(keep=1.0),
        evaluate=lambda network: 1.0 if network is model else 0.5,
        steps=2,
    )
    assert result.model is model
    assert not result.plan
    assert result.value == result.dense_value


def test_a_search_that_promises_too_much_says_what_it_reached() -> None:
    model, data = classifier()
    found = weft.survey(model)
    evaluate = lambda network: accuracy(network, data)  # noqa: E731
    with pytest.raises(ValueError, match="budget must be such that 1.0000 of the metric can be kept, got 0"):
        search(model, found, "LowRank", Budget(keep=1.0, bytes=0.1), evaluate=evaluate)
    with pytest.raises(ValueError, match="budget keep must be given, got None"):
        search(model, found, "LowRank", Budget(bytes=0.1), evaluate=evaluate)
    with pytest.raises(ValueError, match="metric of the dense network must be above 0, got 0"):
        search(model, found, "LowRank", Budget(keep=0.9), evaluate=lambda network: 0.0)
    with pytest.raises(ValueError, match="budget keep must be left to a search"):
        weft.allocate(found, "LowRank", Budget(keep=0.9))
