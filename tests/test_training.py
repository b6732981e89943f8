"""The training loop: its options, its log, what it refuses, and going on after a kill."""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.examples import EXAMPLES, Example, each_example
from weft.layers.linear import StructuredLinear
from weft.layers.replace import replace_layer
from weft.schemes.checkpoint import Checkpoint, read_state, write_state
from weft.schemes.corrections import correct_batch_norm
from weft.schemes.fine_tune import fine_tune
from weft.schemes.log import Log, read_log
from weft.schemes.objective import Objective
from weft.schemes.training import Training

Batches = list[tuple[Tensor, Tensor]]


def network(width: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 3)
    )


def batches(count: int = 6, size: int = 10) -> Batches:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        x = torch.randn(size, 8, generator=generator)
        found.append((x, x[:, :3].argmax(1)))
    return found


def assert_same(one: nn.Module, two: nn.Module) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


# ------------------------------------------------------------------------------------------------------------
# The loop


def test_the_same_call_gives_the_same_result_and_leaves_the_users_randomness_alone() -> None:
    model = network()
    one = fine_tune(model, batches(), epochs=2).model
    torch.manual_seed(6)
    before = torch.get_rng_state()
    two = fine_tune(model, batches(), epochs=2).model
    assert_same(one, two)
    assert torch.equal(torch.get_rng_state(), before)
    other = fine_tune(model, batches(), epochs=2, seed=1).model  # another dropout
    assert not torch.equal(one[0].weight, other[0].weight)


def test_accumulated_gradients_are_those_of_one_large_batch_whatever_the_sizes() -> None:
    x, labels = torch.randn(10, 8), torch.arange(10) % 3
    parts = [(x[:4], labels[:4]), (x[4:5], labels[4:5]), (x[5:], labels[5:])]
    model = nn.Linear(8, 3)
    options: dict[str, Any] = {"optimiser": lambda found: torch.optim.SGD(found, lr=0.1), "epochs": 2}
    whole = fine_tune(model, [(x, labels)], **options)
    split = fine_tune(model, parts, accumulate=3, **options)
    torch.testing.assert_close(whole.model.weight, split.model.weight)
    assert [entry["loss"] for entry in split.log] == pytest.approx([entry["loss"] for entry in whole.log])
    assert len(fine_tune(model, parts, accumulate=2, **options).log) == 4  # the last group is smaller


def test_a_clipped_step_is_no_longer_than_the_bound() -> None:
    model = nn.Linear(8, 3)
    x, labels = batches(1)[0]

    def sgd(found: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(found, lr=1.0)

    def moved(**options: Any) -> float:
        tuned = fine_tune(model, [(100 * x, labels)], optimiser=sgd, **options).model
        steps = [a - b for a, b in zip(tuned.parameters(), model.parameters(), strict=True)]
        return float(torch.nn.utils.get_total_norm(steps))

    assert moved() > 1
    assert moved(clip=0.01) == pytest.approx(0.01, rel=1e-3)


def test_a_penalty_pulls_the_weights_and_is_logged() -> None:
    model, target = nn.Linear(8, 3), torch.zeros(3, 8)
    log = Training(epochs=60, learning_rate=0.05, schedule="constant").run(
        model, batches(1), penalty=lambda net: 1e3 * (net.weight - target).square().sum()
    )
    assert float(model.weight.detach().norm()) < 0.05
    assert {"penalty", "loss", "step", "epoch", "seconds"} <= log.entries[0].keys()
    assert log.entries[-1]["penalty"] < 1e-2 * log.entries[0]["penalty"]


def test_stages_share_a_log_and_see_other_randomness() -> None:
    log, steps = Log(), []
    for stage in range(2):
        Training(schedule="constant").run(
            network(), batches(), log=log, notes={"stage": stage}, after_step=lambda net: steps.append(net)
        )
    assert [entry["step"] for entry in log.entries] == list(range(12)) == list(range(len(steps)))
    assert [entry["stage"] for entry in log.entries] == [0] * 6 + [1] * 6
    assert log.entries[0]["loss"] != log.entries[6]["loss"]


@pytest.mark.parametrize("optimiser", ["adamw", "adam", "rmsprop", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_every_named_optimiser_and_schedule_trains(optimiser: str, schedule: str) -> None:
    log = fine_tune(
        network(), batches(), epochs=15, learning_rate=1e-2, optimiser=optimiser, schedule=schedule
    ).log
    assert sum(entry["loss"] for entry in log[-6:]) < 0.8 * sum(entry["loss"] for entry in log[:6])


def test_a_scheduler_of_ones_own_is_stepped_after_every_step() -> None:
    rates: list[float] = []

    def make(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        assert steps == 9
        optimiser.register_step_pre_hook(lambda made, *_: rates.append(made.param_groups[0]["lr"]))
        return torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=steps)

    fine_tune(network(), batches(), epochs=3, accumulate=2, schedule=make)
    assert len(rates) == 9
    assert rates[0] == pytest.approx(0.1 / 25)
    assert max(rates) > 0.09
    assert rates[-1] < 1e-4


def test_mixed_precision_computes_in_bfloat16_and_keeps_the_weights_in_float32() -> None:
    seen = []
    model = network()
    model[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    tuned, log = fine_tune(model, batches(), epochs=20, learning_rate=1e-2, mixed_precision=True)
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in tuned.parameters()} == {torch.float32}
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]


@each_example
@pytest.mark.parametrize("convolution", [False, True], ids=["linear", "convolution"])
def test_every_family_trains_in_mixed_precision(example: Example, convolution: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3, padding=1) if convolution else nn.Linear(16, 12)
    shape = tuple(layer.weight.shape)
    body = [layer, nn.Flatten(), nn.Linear(8 * 16, 12)] if convolution else [layer]
    model = replace_layer(nn.Sequential(*body), ["0"], example.structure(shape).initialise(shape))
    x = torch.randn(32, 4, 4, 4) if convolution else torch.randn(32, 16)
    data = [(x, x.flatten(1)[:, :12].argmax(1))]
    log = fine_tune(model, data, epochs=3, mixed_precision=True).log
    plain = fine_tune(model, data, epochs=3).log
    assert log[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.05)
    assert log[-1]["loss"] < log[0]["loss"]


# ------------------------------------------------------------------------------------------------------------
# Validation


def test_the_best_epoch_is_kept_and_training_ends_when_nothing_improves() -> None:
    metrics = iter([0.1, 0.5, 0.3, 0.5, 0.9])
    states: list[Tensor] = []

    def validate(model: nn.Module) -> float:
        assert not model.training
        states.append(model[0].weight.detach().clone())
        return next(metrics)

    tuned, log = fine_tune(network(), batches(), epochs=5, patience=2, validation=validate)
    assert [entry["metric"] for entry in log if "metric" in entry] == [0.1, 0.5, 0.3, 0.5]
    assert torch.equal(tuned[0].weight, states[1])
    assert not torch.equal(states[3], states[1])


def test_validation_batches_give_the_accuracy() -> None:
    data = batches()
    tuned, log = fine_tune(network(), data, epochs=30, learning_rate=1e-2, validation=data[:2])
    found = [entry for entry in log if "metric" in entry]
    assert len(found) == 30
    assert found[-1]["metric"] > 0.8 > found[0]["metric"]
    assert found[0].keys() == {"step", "epoch", "metric", "size", "seconds"}
    with pytest.raises(ValueError, match="validation must be given with patience, got None"):
        fine_tune(network(), data, patience=1)


# ------------------------------------------------------------------------------------------------------------
# Teachers


def test_features_are_learnt_without_labels() -> None:
    torch.manual_seed(3)
    teacher, student = network(), network()
    nn.init.normal_(student[0].weight)
    x = [torch.randn(30, 8) for _ in range(4)]

    def distance(model: nn.Module) -> float:
        with torch.no_grad():
            own, wanted = (net[:2].eval()(x[0]) for net in (model, teacher))
        return float((own - wanted).square().sum() / wanted.square().sum())

    tuned, log = fine_tune(
        student, x, teacher=teacher, epochs=40, learning_rate=1e-2, features=("1",), feature_weight=10.0
    )
    assert distance(tuned) < 0.2 * distance(student)
    objective = Objective(features=("1",), feature_weight=3.0)
    with_features, without = (
        float(made(teacher.eval(), x[0], student.eval()).detach()) for made in (objective, Objective())
    )
    with torch.no_grad():
        own, wanted = teacher[:2](x[0]), student[:2](x[0])
    expected = float((own - wanted).square().sum() / wanted.square().sum())
    assert with_features - without == pytest.approx(3 * expected, rel=1e-4)


def test_features_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="features must be a module of the student, got 'layer9'"):
        fine_tune(network(), batches(), teacher=network(), features=("layer9",))
    with pytest.raises(ValueError, match="teacher must be given with features, got None"):
        fine_tune(network(), batches(), features=("1",))


def test_batch_norm_is_corrected_before_training_and_once_only(tmp_path: Path) -> None:
    teacher = network()
    for _ in range(30):
        teacher(torch.randn(50, 8) + 1)
    teacher.eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student[0].weight.mul_(0.5)
    student[1].momentum = 0.0  # training leaves the statistics alone
    data = [x + 1 for x, _ in batches()]
    expected = copy.deepcopy(student)
    correct_batch_norm(expected, teacher, data)
    tuned = fine_tune(student, data, teacher=teacher, batch_norm=True).model
    torch.testing.assert_close(tuned[1].running_mean, expected[1].running_mean)
    torch.testing.assert_close(tuned[1].running_var, expected[1].running_var)
    again = fine_tune(tuned, data, teacher=teacher, batch_norm=True, learning_rate=1e-12).model
    torch.testing.assert_close(again[1].running_var, tuned[1].running_var, rtol=0.1, atol=1e-3)
    with pytest.raises(ValueError, match="teacher must be given with batch_norm, got None"):
        fine_tune(student, batches(), batch_norm=True)


# ------------------------------------------------------------------------------------------------------------
# Bad input


def test_labels_out_of_range_are_named() -> None:
    x, _ = batches(1)[0]
    with pytest.raises(ValueError, match="labels must be between 0 and 2, got 0 to 3; check that data"):
        fine_tune(network(), [(x, torch.arange(10) % 4)])
    ignored = torch.full((10,), -100)
    ignored[:5] = 1
    assert math.isfinite(fine_tune(network(), [(x, ignored)]).log[0]["loss"])


def test_a_loss_that_breaks_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    data = batches(4)
    broken = [*data[:3], (data[3][0] * 1e30, data[3][1])]
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    with torch.no_grad():
        model[1].weight.mul_(1e10)
    with pytest.raises(
        ValueError,
        match=r"got (nan|inf) at step 3, in the output of layer '1' \(norms of its weights: weight",
    ):
        fine_tune(model, broken, checkpoint=tmp_path / "run", checkpoint_seconds=0)
    held = read_state(tmp_path / "run" / "checkpoint.safetensors")["inner"]
    assert (held["epoch"], held["done"]) == (0, 3)
    assert all(bool(tensor.isfinite().all()) for tensor in held["model"].values())
    assert len(read_log(tmp_path / "run" / "log.jsonl")) == 3


def test_weights_that_overflow_are_not_written(tmp_path: Path) -> None:
    def wild(found: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(found, lr=1e38)

    with pytest.raises(
        ValueError, match="weights must be finite, got nan at step 1, in weight weight of norm"
    ):
        fine_tune(
            nn.Linear(8, 3),
            [(1e4 * x, labels) for x, labels in batches()],
            optimiser=wild,
            checkpoint=tmp_path / "run",
            checkpoint_seconds=0,
        )
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_a_gradient_that_is_not_finite_names_its_weight() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3] * self.scale.abs().sqrt()

    with pytest.raises(
        ValueError, match="norm of the gradient must be finite, got nan at step 0, in the gradient of scale"
    ):
        fine_tune(Root(), batches())


# ------------------------------------------------------------------------------------------------------------
# What training leaves as it is


def layers(example: Example, shape: tuple[int, int] = (16, 16)) -> nn.Sequential:
    """Two layers that share one member, and a dense one."""
    torch.manual_seed(0)
    member = example.structure(shape).fit(torch.randn(shape))
    biases = torch.zeros(shape[0]), torch.zeros(shape[0])
    return nn.Sequential(
        StructuredLinear(member, biases[0]), nn.Tanh(), StructuredLinear(member, biases[1]), nn.Linear(16, 3)
    )


@each_example
def test_training_changes_no_support_and_unties_nothing(example: Example) -> None:
    model = layers(example)
    x = torch.randn(20, 16)
    tuned, log = fine_tune(model, [(x, x[:, :3].argmax(1))], epochs=4, learning_rate=1e-2, weight_decay=0.1)
    before, after = model[0].matrix, tuned[0].matrix
    assert tuned[2].matrix is after
    assert after.structure == before.structure
    assert after.cost() == before.cost()
    relaxed = copy.deepcopy(before).relax()
    fixed = {name for name, tensor in relaxed.named_buffers() if not tensor.is_floating_point()}
    kept = {name: tensor for name, tensor in before.named_buffers() if name in fixed}
    for name, tensor in kept.items():  # what relaxing keeps as integers are supports and orders, not codes
        assert torch.equal(tensor, after.get_buffer(name)), name
    assert not torch.equal(before.to_dense(), after.to_dense())
    assert log[-1]["loss"] < log[0]["loss"]


def test_what_holds_only_integers_says_so() -> None:
    layer = StructuredLinear(EXAMPLES[0].structure((3, 8)).fit(torch.randn(3, 8)))
    del layer.matrix.weight
    layer.matrix.register_buffer("weight", torch.zeros(3, 8, dtype=torch.int8))
    expected = "one with weights to train, got none: all tensors of '0' are integers; plan a family"
    with pytest.raises(ValueError, match=expected):
        fine_tune(nn.Sequential(layer), batches())


# ------------------------------------------------------------------------------------------------------------
# Log and checkpoint


class KilledError(Exception):
    pass


def test_the_log_is_json_lines_and_can_be_rewound(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    _, log = fine_tune(network(), batches(), log=path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == log == read_log(path)
    assert lines[0].keys() == {"step", "epoch", "loss", "size", "seconds"}
    assert lines[0]["size"] == sum(tensor.nbytes for tensor in network().state_dict().values())
    held = Log(path)
    held.step(loss=1.0)
    place = held.position()
    held.step(loss=2.0)
    with path.open("a") as file:
        file.write('{"half a li')
    assert len(read_log(path)) == 2
    again = Log(path)
    again.rewind(place)
    assert [entry["loss"] for entry in again.entries] == [1.0]
    again.step(loss=3.0)
    assert [entry["loss"] for entry in read_log(path)] == [1.0, 3.0]
    path.write_text("")
    with pytest.raises(ValueError, match=r"must be at least \d+ bytes long, got 0; put it back"):
        Log(path).rewind(place)


def test_state_of_any_kind_comes_back(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4)
    state = {
        "numbers": [1, 2.5, -math.inf, True, None],
        3: ("a", (tensor.t(), tensor)),
        "empty": {"list": [], "tuple": (), "dictionary": {}, "tensor": torch.zeros(0)},
        "half": torch.ones((), dtype=torch.bfloat16),
    }
    write_state(tmp_path / "state", state)
    back = read_state(tmp_path / "state")
    assert back["numbers"] == state["numbers"]
    assert torch.equal(back[3][1][0], tensor.t())
    assert isinstance(back[3], tuple)
    assert back["empty"].keys() == state["empty"].keys()
    assert back["half"].dtype == torch.bfloat16
    with pytest.raises(
        TypeError, match=r"state\.a must be tensors, numbers, text and containers, got object"
    ):
        write_state(tmp_path / "state", {"a": object()})
    assert read_state(tmp_path / "state").keys() == state.keys()
    (tmp_path / "state").write_bytes(b"x" * 100)
    with pytest.raises(
        ValueError, match="must be a whole checkpoint, got .*; remove the folder to start anew"
    ):
        read_state(tmp_path / "state")


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    fine_tune(network(), batches(), checkpoint=tmp_path / "run")
    with pytest.raises(
        ValueError, match="one of this run, got learning_rate 0.001 there, 0.1 here; give the same"
    ):
        fine_tune(network(), batches(), checkpoint=tmp_path / "run", learning_rate=0.1)
    with pytest.raises(ValueError, match="one of this run, got tensors"):
        fine_tune(network(width=5), batches(), checkpoint=tmp_path / "run")


def test_a_scheme_of_stages_keeps_its_own_state_beside_the_loops(tmp_path: Path) -> None:
    training = Training(schedule="constant")

    def run(folder: str, stop: int | None = None) -> tuple[nn.Module, Log]:
        """Two stages of training with a rounding between them, as a scheme might have."""
        model, steps = network(), 0
        kept = Checkpoint(tmp_path / folder, {"scheme": "two stages"}, seconds=0)

        def count(_: nn.Module) -> None:
            nonlocal steps
            steps += 1
            if steps == stop:
                raise KilledError

        kept.outer.setdefault("stage", 0)
        while (stage := kept.outer["stage"]) < 2:
            held = kept.outer.get("weights")
            if held is not None:
                model.load_state_dict(held)
            training.run(model, batches(), checkpoint=kept, after_step=count, notes={"stage": stage})
            with torch.no_grad():
                model[0].weight.copy_(model[0].weight.mul(8).round() / 8)
            kept.outer.update(stage=stage + 1, weights={**model.state_dict()})
            kept.log.note(stage=stage, rounded=True)
            kept.write()
        return model, kept.log

    whole, log = run("whole")
    assert len(log.entries) == 14
    for stop in (3, 6, 7, 9):
        with pytest.raises(KilledError):
            run(f"killed{stop}", stop)
        model, again = run(f"killed{stop}")
        assert_same(model, whole)
        assert [entry.get("loss") for entry in again.entries] == [entry.get("loss") for entry in log.entries]


def test_what_a_killed_run_was_writing_is_cleared_away(tmp_path: Path) -> None:
    fine_tune(network(), batches(), checkpoint=tmp_path / "run")
    part = tmp_path / "run" / ".checkpoint.safetensors.123.part"
    part.write_bytes(b"half")
    fine_tune(network(), batches(), checkpoint=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint.safetensors",
        "log.jsonl",
    ]


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    one = fine_tune(network(), batches(), checkpoint=tmp_path / "run")
    two = fine_tune(network(), batches(), checkpoint=tmp_path / "run")
    assert_same(one.model, two.model)
    assert one.log == two.log


@pytest.mark.parametrize("stop", [1, 4, 6, 7, 11])
@pytest.mark.parametrize("shuffled", ["loader", "generator", "own"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, stop: int, shuffled: str
) -> None:
    """Dropout, momentum, schedule, order of the data, early stopping: all go on from where they were."""

    class Own:
        """Batches in an order of their own for every pass, as weft's data sets give them."""

        passes = 0

        def resume_at(self, passes: int) -> None:
            self.passes = passes

        def __len__(self) -> int:
            return 6

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            data = batches()
            order = torch.randperm(6, generator=torch.Generator().manual_seed(self.passes))
            return (data[index] for index in order)

    def data() -> Any:
        if shuffled == "own":
            return Own()
        parts = [torch.cat(part) for part in zip(*batches(), strict=True)]
        generator = torch.Generator().manual_seed(4) if shuffled == "generator" else None
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*parts), batch_size=10, shuffle=True, generator=generator
        )

    def run(folder: str, kill: int | None = None) -> tuple[nn.Module, Log]:
        model, steps = network(), 0

        def count(_: nn.Module) -> None:
            nonlocal steps
            steps += 1
            if steps == kill:
                raise KilledError

        kept = Checkpoint(tmp_path / folder, seconds=0)
        log = Training(epochs=3, learning_rate=1e-2, optimiser="rmsprop", patience=2).run(
            model, data(), validation=batches(2), checkpoint=kept, after_step=count
        )
        return model, log

    whole, log = run("whole")
    with pytest.raises(KilledError):
        run("killed", stop)
    if stop > 1:
        held = read_state(tmp_path / "killed" / "checkpoint.safetensors")
        assert held["log"]["steps"] == stop - 1
    model, again = run("killed")
    assert_same(model, whole)
    timeless = [[{**entry, "seconds": 0} for entry in each.entries] for each in (again, log)]
    assert timeless[0] == timeless[1]
