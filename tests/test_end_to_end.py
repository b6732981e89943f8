"""The whole path on networks of several kinds: survey, plan, compress, fine-tune, measure, save and load."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import weft
from weft.measure import accuracy, network_cost
from weft.plan.plan import Plan
from weft.storage import structured_layers
from weft.survey import Survey


class Convolutional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding="same", bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=4, padding_mode="reflect"),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 24, (4, 1), dilation=(1, 2)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 10),
        )


class Sequences(nn.Module):
    """Tied embedding, transformer layers, a head over the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 48, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.middle = nn.Linear(16, 16)
        self.head = nn.Linear(16, 11)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.encoder(self.embedding(x))[:, -1])))


class SharedBlocks(nn.Module):
    """One block applied three times, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
        self.blocks = nn.ModuleList([self.block] * 3)
        self.up, self.down = nn.Linear(12, 12), nn.Linear(12, 12)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.down(torch.tanh(self.up(x)))


def floats(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Any], int]] = {
    "convolutional": (Convolutional, floats(6, 3, 8, 9), 10),
    "sequences": (Sequences, lambda generator: torch.randint(11, (6, 5), generator=generator), 11),
    "shared": (SharedBlocks, floats(6, 12), 12),
    "bare": (lambda: nn.Linear(12, 10), floats(6, 12), 10),
    "double": (
        lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)).double(),
        floats(6, 12),
        8,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_whole_path(name: str, tmp_path: Path) -> None:
    make, draw, classes = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    xs = [draw(generator) for _ in range(4)]
    batches = [(x.to(dtype) if x.is_floating_point() else x, torch.arange(6) % classes) for x in xs]
    before = copy.deepcopy(model.state_dict())

    found = weft.survey(model, weft.inputs(batches), teacher=model)
    found = Survey.load(found.save(tmp_path / "survey.json"), model)
    budget = weft.Budget(parameters=0.8, multiply_adds=0.9)
    plan = weft.allocate(found, ["LowRank", "Dense"], budget)
    plan = Plan.load(plan.save(tmp_path / "plan.json"))
    small, log = weft.compress(model, plan, found, batches=weft.inputs(batches))
    assert log
    sample = batches[0][0]
    assert network_cost(small, sample) == plan.total
    limits = budget.limits(found.total)
    assert all(getattr(network_cost(small, sample), key) <= limit for key, limit in limits.items())

    tuned, steps = weft.fine_tune(small, batches, teacher=model, epochs=6, learning_rate=3e-3)
    assert sum(step["loss"] for step in steps[-4:]) < sum(step["loss"] for step in steps[:4])
    path = weft.save(tuned, tmp_path / "small.safetensors")
    torch.manual_seed(9)
    again = weft.load(path, model=make().to(dtype).eval())
    assert structured_layers(again) == structured_layers(tuned)
    with torch.no_grad():
        for x, _ in batches:
            assert torch.equal(again(x), tuned(x))
    report = weft.measure(again, against=model, data=batches, batches=(1,), seconds=0.01)
    assert report.cost == plan.total
    assert report.value == accuracy(tuned, batches)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """A network trained on scikit-learn's digits, its training and its held-out batches."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    train = list(zip(x[:1400].split(100), y[:1400].split(100), strict=True))
    test = list(zip(x[1400:].split(100), y[1400:].split(100), strict=True))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 48),
        nn.ReLU(),
        nn.Linear(48, 10),
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(8):
        for images, labels in train:
            optimiser.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimiser.step()
    return model.eval(), train, test


def test_squeeze_keeps_a_trained_networks_accuracy_at_a_quarter_of_its_bytes(
    digits: tuple[nn.Module, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]],
) -> None:
    model, train, test = digits
    dense = accuracy(model, test)
    assert dense > 0.95
    small, report = weft.squeeze(model, train, held_out=test, families="LowRank", bytes=0.25)
    assert report.cost.bytes <= 0.25 * report.dense_cost.bytes
    assert (report.dense_value, report.value) == (dense, accuracy(small, test))
    assert report.value > dense - 0.1
    tuned, report = weft.squeeze(model, train, held_out=test, families="LowRank", bytes=0.25, epochs=3)
    assert report.cost.bytes <= 0.25 * report.dense_cost.bytes
    assert report.value > dense - 0.02


def test_squeeze_takes_every_kind_of_budget(
    digits: tuple[nn.Module, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]],
) -> None:
    model, train, test = digits
    small, report = weft.squeeze(model, train, held_out=test, keep=0.95)
    assert report.cost.bytes < 0.8 * report.dense_cost.bytes
    assert accuracy(small, train) >= 0.95 * accuracy(model, train)
    _, report = weft.squeeze(model, train, held_out=test, peak_memory=0.8)
    assert report.footprint.memory < report.dense_footprint.memory
    with pytest.raises(ValueError, match=r"budget latency must be at least .* s, the smallest"):
        weft.squeeze(model, train, latency_seconds=1e-9)


def test_output_grams_help_a_trained_network(
    digits: tuple[nn.Module, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]],
) -> None:
    model, train, test = digits
    budget = weft.Budget(parameters=0.2)
    losses = {}
    for name, options in (("plain", None), ("inputs", {}), ("inputs and outputs", {"teacher": model})):
        batches = None if options is None else weft.inputs(train)
        found = weft.survey(model, batches, **(options or {}))
        small, _ = weft.compress(model, weft.allocate(found, "LowRank", budget), found)
        with torch.no_grad():
            losses[name] = sum(float(F.cross_entropy(small(x), y)) for x, y in test)
    assert losses["inputs"] < losses["plain"]
    assert losses["inputs and outputs"] < losses["inputs"]


def test_squeeze_refuses_what_it_cannot_use_before_any_work() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    data = [(torch.randn(5, 4), torch.zeros(5).long())]
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        weft.squeeze(model, data, size=0.5)
    with pytest.raises(ValueError, match="budget must be given as one of"):
        weft.squeeze(model, data)
    with pytest.raises(TypeError, match="data must be iterable more than once, got list_iterator"):
        weft.squeeze(model, iter(data), bytes=0.5)
    with pytest.raises(TypeError, match="held_out must be iterable more than once, got generator"):
        weft.squeeze(model, data, held_out=(batch for batch in data), bytes=0.5)
