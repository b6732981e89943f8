"""Learning-compression against closed forms, exhaustive choices and its own laws."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.numerics.kmeans import codebooks
from weft.plan.budget import Budget, Price
from weft.schemes.learning_compression import (
    Added,
    Each,
    LearningCompression,
    Priced,
    Task,
    Together,
    Within,
    rising,
)
from weft.schemes.training import Training
from weft.structures.base import DenseGram, Structure
from weft.structures.dense import Dense
from weft.structures.low_rank import LowRank
from weft.structures.pruned import Pruned
from weft.structures.quantized import Quantized
from weft.structures.sum_of import sum_of

INPUTS, OUTPUTS = 12, 8


class Regression:
    """L(W) = ½ tr (W − W*) G (W − W*)ᵀ of one linear layer, whose L step has a closed form."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(200, INPUTS, generator=generator, dtype=torch.float64)
        x = x * torch.logspace(0, -1.5, INPUTS, dtype=torch.float64)  # some inputs matter more than others
        self.x, self.gram = x, x.T @ x / len(x)
        self.best = torch.randn(OUTPUTS, INPUTS, generator=generator, dtype=torch.float64)
        self.model = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.model.weight.copy_(self.best)

    def loss(self, weight: Tensor) -> float:
        lost = weight.detach() - self.best
        return float((lost @ self.gram * lost).sum() / 2)

    def learn(self, model: nn.Module, penalty: Callable[[nn.Module], Tensor], step: int) -> None:
        """The L step in closed form: the penalty is quadratic, so that two gradients say all of it."""
        weight: Any = model.weight
        gradients = []
        for value in (0.0, 1.0):
            with torch.no_grad():
                weight.fill_(value)
            gradients += torch.autograd.grad(penalty(model), weight)
        mu = float((gradients[1] - gradients[0]).mean())
        system = self.gram + mu * torch.eye(INPUTS, dtype=torch.float64)
        with torch.no_grad():
            weight.copy_(torch.linalg.solve(system, (self.best @ self.gram - gradients[0]).T).T)

    def run(self, task: Task | Structure, **options: Any) -> weft.Result:
        options = {"penalties": rising(1e-3, 1.1, 120), **options}
        survey = options.pop("survey", None)
        return LearningCompression(**options).run(self.model, {"": task}, [], learn=self.learn, survey=survey)


def weight_of(result: weft.Result, name: str = "") -> Tensor:
    layer: Any = result.model.get_submodule(name)
    return layer.matrix.to_dense().detach() if hasattr(layer, "matrix") else layer.weight.detach()


# ------------------------------------------------------------------------------------------------------------
# Optima that are known


@pytest.mark.parametrize("seed", range(3))
def test_low_rank_regression_reaches_the_reduced_rank_optimum(seed: int) -> None:
    problem = Regression(seed)
    # Generalised Eckart-Young: the optimum is the fit in the metric of the inputs.
    optimum = problem.loss(
        LowRank(2).fit(problem.best, input_gram=DenseGram(problem.gram, shrinkage=0.0)).to_dense()
    )
    direct = problem.loss(LowRank(2).fit(problem.best).to_dense())
    found = problem.loss(weight_of(problem.run(LowRank(2))))
    assert optimum * (1 - 1e-9) <= found <= optimum + 0.02 * (direct - optimum)


def test_in_the_metric_of_outputs_the_first_members_are_already_those_of_direct_compression() -> None:
    problem = Regression()
    survey = weft.survey(problem.model, [problem.x])
    direct = weft.compress(problem.model, {"": LowRank(2)}, survey)
    scheme = LearningCompression(penalties=[1.0], metric="outputs")
    first = scheme.run(problem.model, {"": LowRank(2)}, [], learn=lambda *_: None, survey=survey)
    assert problem.loss(weight_of(first)) == pytest.approx(problem.loss(weight_of(direct)), rel=1e-4)
    assert problem.loss(weight_of(first)) < 0.9 * problem.loss(LowRank(2).fit(problem.best).to_dense())


def test_in_the_metric_of_outputs_the_penalty_is_that_of_the_outputs() -> None:
    problem = Regression()
    survey = weft.survey(problem.model, [problem.x])
    gram = survey.layers[""].input_gram
    assert gram is not None
    found: list[Tensor] = []

    def learn(model: nn.Module, penalty: Callable[[nn.Module], Tensor], step: int) -> None:
        weight: Any = model.weight
        with torch.no_grad():
            weight.mul_(1.1)
        found.extend(torch.autograd.grad(penalty(model), weight))

    scheme = LearningCompression(penalties=[0.3], metric="outputs")
    scheme.run(problem.model, {"": LowRank(2)}, [], learn=learn, survey=survey)
    start = LowRank(2).fit(problem.best, input_gram=gram).to_dense()
    metric = gram.dense() / gram.dense().diagonal().mean()
    torch.testing.assert_close(found[0], 0.3 * (1.1 * problem.best - start) @ metric)


@pytest.mark.parametrize("seed", range(3))
def test_codebook_regression_comes_within_a_hundredth_of_the_optimum(seed: int) -> None:
    problem = Regression(seed)
    # Where the inputs are uncorrelated the optimum is a weighted clustering on a line: dynamic programming.
    problem.gram = problem.gram.diagonal().diag()
    masses = problem.gram.diagonal().repeat(OUTPUTS)[None]
    levels = codebooks(problem.best.reshape(1, -1), 2, masses)[0]
    nearest = levels[(problem.best.reshape(-1, 1) - levels).abs().argmin(1)].reshape(problem.best.shape)
    optimum = problem.loss(nearest)
    binary = Quantized(1, codebook="kmeans")
    found = problem.loss(weight_of(problem.run(binary, multipliers=False)))
    assert optimum * (1 - 1e-9) <= found <= optimum * 1.01
    assert found < problem.loss(binary.fit(problem.best).to_dense())


@pytest.mark.parametrize("structure", [LowRank(2), Pruned(0.25)], ids=str)
def test_multipliers_bring_weights_and_members_together_much_faster(structure: Structure) -> None:
    problem = Regression()
    distances = {
        multipliers: problem.run(structure, multipliers=multipliers).log[-1]["distance"]
        for multipliers in (False, True)
    }
    assert distances[True] < 1e-6
    assert distances[True] < 1e-3 * distances[False]


def test_the_multipliers_become_the_gradient_of_the_loss() -> None:
    problem = Regression()
    anchors = []

    def learn(model: nn.Module, penalty: Callable[[nn.Module], Tensor], step: int) -> None:
        problem.learn(model, penalty, step)
        weight: Any = model.weight
        anchors.append(torch.autograd.grad(penalty(model), weight)[0])

    problem_run = LearningCompression(penalties=rising(1e-3, 1.1, 120))
    result = problem_run.run(problem.model, {"": LowRank(2)}, [], learn=learn)
    # At the end of an L step ∇L + μ (W − Δ(Θ)) − B = 0; once W = Δ(Θ) the last two terms are −B.
    gradient = (weight_of(result) - problem.best) @ problem.gram
    torch.testing.assert_close(-anchors[-1], gradient, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# C steps


def two_layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 14), nn.ReLU(), nn.Linear(14, 6)).to(dtype)


def c_step(task: Task, model: nn.Module, mu: float, batches: Any = None) -> Mapping[str, Any]:
    survey = weft.survey(model, batches)  # without batches there are no Grams
    task.check(survey)
    return task.fit(survey, mu, {})


@pytest.mark.parametrize("mu", [1e-3, 0.02, 0.1, 0.5, 3.0])
@pytest.mark.parametrize(
    "price", [Price(parameters=1e-3), Price(multiply_adds=2e-3), Price(bytes=3e-4)], ids=str
)
@pytest.mark.parametrize("metric", ["weights", "outputs"])
def test_a_priced_c_step_takes_the_best_rank_of_all(mu: float, price: Price, metric: str) -> None:
    model = two_layers()
    surveyed = weft.survey(model, [torch.randn(4, 10)])
    layers = surveyed.layers
    if metric == "weights":
        layers = {name: replace(layer, input_gram=None) for name, layer in layers.items()}
    survey = replace(surveyed, layers=layers)
    found = Priced("LowRank", price).fit(survey, mu, {})
    for name, layer in survey.layers.items():
        everything = [Dense(), *(LowRank(rank) for rank in range(1, min(layer.shape) + 1))]
        objectives = {}
        for structure in everything:
            member = structure.fit(layer.weight, input_gram=layer.input_gram)
            error = (layer.weight - member.to_dense()).detach()
            lost = error.square().sum()
            if layer.input_gram is not None:
                lost = (error @ layer.input_gram.dense().float() * error).sum()
            objectives[structure] = price.of(member.cost()) + mu / 2 * float(lost)
        assert found[name].structure == min(objectives, key=objectives.__getitem__)


def test_a_priced_c_step_chooses_the_family_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(20, 1) @ torch.randn(1, 20))
        model[1].weight.zero_()
        model[1].weight[3, 4] = 5.0
        model[1].weight[7, 1] = -4.0
    found = c_step(Priced("LowRank,Pruned", Price(parameters=1e-3)), model, 10.0)
    assert isinstance(found["0"].structure, LowRank)
    assert isinstance(found["1"].structure, Pruned)


def test_a_price_that_rises_never_gives_a_larger_network() -> None:
    model = two_layers()
    sizes = [
        sum(
            member.cost().parameters
            for member in c_step(Priced("LowRank", Price(parameters=price)), model, 1.0).values()
        )
        for price in (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == sum(layer.weight.numel() for layer in model if isinstance(layer, nn.Linear))


def test_together_keeps_the_largest_of_all_weights() -> None:
    model = two_layers()
    with torch.no_grad():
        model[0].weight.normal_().mul_(1.5)  # so that the layers' shares differ
        model[2].weight.normal_()
    found = c_step(Together(Pruned(0.2)), model, 1.0)
    everything = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach()
    count = round(0.2 * everything.numel())
    threshold = everything.abs().sort(descending=True).values[count - 1]
    expected = torch.where(everything.abs() >= threshold, everything, 0)
    kept = torch.cat([found[name].to_dense().flatten() for name in ("0", "2")]).detach()
    assert torch.equal(kept, expected)
    shares = [found[name].structure.density for name in ("0", "2")]
    assert shares[0] > 0.2 > shares[1]


def test_together_keeps_the_heaviest_blocks_of_all_weights() -> None:
    model = two_layers()
    found = c_step(Together(Pruned(0.25, pattern="2x2")), model, 1.0)
    blocks = {
        name: model.get_submodule(name).weight.detach().unfold(0, 2, 2).unfold(1, 2, 2).square().sum((2, 3))
        for name in ("0", "2")
    }
    everything = torch.cat([part.flatten() for part in blocks.values()])
    threshold = everything.sort(descending=True).values[round(0.25 * everything.numel()) - 1]
    for name, part in blocks.items():
        assert torch.equal(found[name].mask(), part >= threshold)


def test_together_in_the_metric_keeps_what_gives_out_most() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 10))
    batch = torch.randn(64, 10) * torch.linspace(0.3, 2.0, 10)  # strong inputs for the first layer
    task = Together(Pruned(0.2, score="input", reconstruct=False))
    found = c_step(task, model, 1.0, [batch])
    layers = weft.survey(model, [batch]).layers
    given = [
        (layer.weight.square() * layer.input_gram.diagonal().float()).flatten()  # pyright: ignore
        for layer in layers.values()
    ]
    everything = torch.cat(given)
    threshold = everything.sort(descending=True).values[round(0.2 * everything.numel()) - 1]
    for own, member in zip(given, found.values(), strict=True):
        assert torch.equal(member.mask().flatten(), own >= threshold)
    plain = task.structure.share_out([layer.weight for layer in layers.values()])
    assert found["0"].structure.density > plain[0].density


@pytest.mark.parametrize("structure", [LowRank(2), Pruned(0.5, pattern="2:4"), Quantized(2)], ids=str)
def test_together_refuses_a_size_that_layers_cannot_share(structure: Structure) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="structure must be of a size that weights can share"):
        LearningCompression(penalties=[1.0]).run(model, {"*": Together(structure)}, [], learn=fail)


def fail(*_: Any) -> None:
    raise AssertionError("no training before the tasks are checked")


def test_within_a_budget_the_c_step_is_the_best_of_all_choices() -> None:
    model = two_layers()
    survey = weft.survey(model)
    budget = Budget(parameters=150)
    found = Within("LowRank", budget).fit(survey, 1.0, {})
    rest = survey.total.parameters - sum(layer.cost.parameters for layer in survey.layers.values())

    def lost(name: str, structure: Structure) -> float:
        weight = survey.layers[name].weight
        return float((weight - structure.fit(weight).to_dense()).detach().square().sum())

    choices = itertools.product(
        *(
            [Dense(), *(LowRank(rank) for rank in range(1, min(layer.shape) + 1))]
            for layer in survey.layers.values()
        )
    )
    best = math.inf
    for choice in choices:
        structures = dict(zip(survey.layers, choice, strict=True))
        size = rest + sum(one.parameter_count(survey.layers[name].shape) for name, one in structures.items())
        if size <= 150:
            best = min(best, sum(lost(name, one) for name, one in structures.items()))
    assert sum(lost(name, member.structure) for name, member in found.items()) == pytest.approx(
        best, rel=1e-5
    )


def test_added_terms_beat_each_term_alone_and_hold_their_structures() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12))
    codes, sparse = Quantized(1, codebook="kmeans"), Pruned(0.1)
    found = c_step(Added((Together(sparse), codes)), model, 1.0)["0"]
    weight = model[0].weight
    lost = float((weight - found.to_dense()).detach().square().sum())
    assert lost < float((weight - codes.fit(weight).to_dense()).detach().square().sum())
    assert [type(term.structure) for term in found.members()] == [Pruned, Quantized]
    assert found.members()[1].to_dense().unique().numel() == 2
    assert int((found.members()[0].to_dense() != 0).sum()) == round(0.1 * weight.numel())


def test_added_terms_choose_their_sizes_by_price() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24))
    left, right = torch.randn(24, 2), torch.randn(2, 24)
    spikes = torch.zeros(24, 24)
    spikes.view(-1)[torch.randperm(576)[:12]] = 8.0
    with torch.no_grad():
        model[0].weight.copy_(left @ right + spikes)
    price = Price(parameters=0.05)
    task, found = Added((Priced("LowRank", price), Priced("Pruned", price))), {}
    for mu in rising(1e-3, 2.0, 10):  # on the way of an LC run: sizes grow with the penalty
        found = task.fit(weft.survey(model), mu, found)

    def objective(member: Any) -> float:
        lost = (model[0].weight - member.to_dense()).detach().square().sum()
        return price.of(member.cost()) + mu / 2 * float(lost)

    planted = sum_of([LowRank(2).fit(left @ right), Pruned(0.03).fit(spikes)])
    assert objective(found["0"]) <= 1.02 * objective(planted)
    alone = [c_step(Priced(family, price), model, mu)["0"] for family in ("LowRank", "Pruned")]
    assert objective(found["0"]) < 0.5 * min(map(objective, alone))


def test_a_later_c_step_is_never_worse_than_the_previous_member() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    survey = weft.survey(model)
    weight = model[0].weight
    tasks: list[Task] = [
        Each(Quantized(2)),
        Priced("LowRank,Quantized", Price(bytes=1e-3)),
        Added((LowRank(2), Quantized(1, codebook="binary"))),
    ]
    for task in tasks:
        first = task.fit(survey, 1.0, {})
        again = task.fit(survey, 1.0, first)

        def objective(member: Any, task: Task = task) -> float:
            lost = (weight - member.to_dense()).detach().square().sum()
            return task.charge(member, survey, "0") + float(lost) / 2

        assert objective(again["0"]) <= objective(first["0"]) * (1 + 1e-6)


# ------------------------------------------------------------------------------------------------------------
# The algorithm on networks


def data(seed: int = 0, count: int = 96) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 10, generator=generator)
    teacher = torch.randn(6, 10, generator=torch.Generator().manual_seed(99))
    return [(part, (part @ teacher.T).argmax(1)) for part in x.split(32)]


TRAINING = Training(epochs=2, learning_rate=0.05, optimiser="sgd", schedule="constant")
SHORT = LearningCompression(TRAINING, rising(3e-2, 2.0, 6), multipliers=False)


def test_layers_get_their_own_tasks_and_others_stay_dense() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 14), nn.ReLU(), nn.Linear(14, 8), nn.ReLU(), nn.Linear(8, 6))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tasks: dict[str, Task | Structure] = {"0": LowRank(3), "2": Pruned(0.2)}
    small, log = SHORT.run(model, tasks, data(), validation=data(1))
    assert [type(layer.matrix.structure) for layer in (small[0], small[2])] == [LowRank, Pruned]
    assert isinstance(small[4], nn.Linear)
    assert not torch.equal(small[4].weight, before["4.weight"])  # trained along
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    rows = [entry for entry in log if "distance" in entry]
    assert [row["lc_step"] for row in rows] == list(range(6))
    assert [row["mu"] for row in rows] == list(SHORT.penalties)
    assert rows[-1]["distance"] < rows[0]["distance"]
    assert rows[-1]["parameters"] == weft.measure(small, against=model, data=data(1)).cost.parameters
    assert {"metric", "size", "multiply_adds", "structures"} <= rows[-1].keys()


def test_the_first_pattern_that_matches_counts() -> None:
    small, _ = SHORT.run(two_layers(), {"2": LowRank(1), "*": LowRank(2)}, data())
    assert [small[index].matrix.structure.rank for index in (0, 2)] == [2, 1]


def test_it_loses_less_than_direct_compression_followed_by_as_much_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 6))
    batches = data(count=512)
    Training(epochs=20, learning_rate=0.05, optimiser="sgd").run(model, batches)
    model.eval()
    structure = Pruned(0.1)

    def loss(network: nn.Module) -> float:
        with torch.no_grad():
            losses = [nn.functional.cross_entropy(network(x), labels) for x, labels in batches]
        return float(torch.stack(losses).mean())

    training = Training(epochs=1, learning_rate=0.1, optimiser="sgd", schedule="constant")
    learned, _ = LearningCompression(training, rising(1e-2, 1.4, 20)).run(model, {"*": structure}, batches)
    direct, _ = weft.compress(model, dict.fromkeys(("0", "2"), structure))
    tuned = [
        loss(weft.fine_tune(direct, batches, epochs=20, learning_rate=rate).model) for rate in (0.01, 0.03)
    ]
    assert loss(learned) < 0.9 * min(tuned)


def test_tied_weights_stay_tied_and_convolutions_and_batch_norm_come_along() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3),
        nn.Flatten(),
        nn.Linear(144, 12),
        nn.Linear(12, 12),
        nn.Linear(12, 12),
    )
    model[7].weight = model[6].weight
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(16, 1, 4, 4, generator=generator), torch.randint(12, (16,), generator=generator))
        for _ in range(3)
    ]
    survey = weft.survey(model, [x for x, _ in batches])
    task = Priced("LowRank", Price(multiply_adds=1e-3))
    small, log = SHORT.run(model, {"*": task}, batches, survey=survey)
    assert small[6].matrix is small[7].matrix
    assert len([entry for entry in log if "distance" in entry][-1]["structures"]) == 4
    assert small(batches[0][0]).isfinite().all()
    assert {
        name: module.training for name, module in small.named_modules() if name in dict(model.named_modules())
    }
    assert small.training == model.training


# ------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"penalties": [1e-3, 1e-2, 9e-3]},
            "penalties must be a schedule that never falls, got 0.009 after 0.01",
        ),
        ({"penalties": []}, "penalties must be at least one"),
        ({"penalties": [0.0, 1.0]}, "penalties must be a finite number above 0"),
        ({"penalties": [1.0, math.inf]}, "penalties must be a finite number above 0"),
        ({"learning_rate_decay": 1.5}, "learning_rate_decay must be a share"),
        ({"metric": "inputs"}, "metric must be one of"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningCompression(**options)


def test_the_metric_of_outputs_wants_to_have_seen_inputs() -> None:
    with pytest.raises(ValueError, match="survey must be one with Grams, got none for 0"):
        replace(SHORT, metric="outputs").run(two_layers(), {"0": LowRank(1)}, data(), learn=fail)


def test_a_factor_that_lets_penalties_fall_is_refused() -> None:
    with pytest.raises(ValueError, match="factor must be at least 1, got 0.9"):
        rising(1e-3, 0.9, 10)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "tasks must be at least one"),
        ({"head": LowRank(1)}, "tasks must be patterns of layer names, got 'head'"),
        ({"0": LowRank(99)}, "layer 0: rank must be between 1 and 10"),
        ({"0": Priced("LowRank", Price(multiply_adds=1e-6))}, "price multiply_adds must be measurable"),
    ],
)
def test_impossible_tasks_are_refused_before_training(tasks: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SHORT.run(two_layers(), tasks, data(), learn=fail)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "price must be above 0 for some cost, got none"),
        ("parameters=-1e-6", "price parameters must be a finite number above 0"),
        ("flops=1", "price must be one of parameters, bytes, multiply_adds, got 'flops'"),
        ("bytes=1e-6,bytes=1", "price bytes must be given once"),
        ("bytes=cheap", "price bytes must be a number, got 'cheap'"),
    ],
)
def test_impossible_prices_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Price.parse(text)


def test_a_loss_that_turns_nan_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    scheme = LearningCompression(Training(learning_rate=1e30, optimiser="sgd"), [1e-3, 1e-2])
    with pytest.raises(ValueError, match="must be finite"):
        scheme.run(two_layers(), {"*": LowRank(1)}, data(), checkpoint=tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.safetensors").is_file()
