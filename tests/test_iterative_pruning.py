"""Iterative pruning: the schedule, the sizes it gives, what training leaves alone, resume."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.schemes.iterative_pruning import IterativePruning, cubic
from weft.schemes.training import Training
from weft.structures.base import Structure
from weft.structures.low_rank import LowRank
from weft.structures.pruned import Pruned
from weft.structures.quantized import Quantized
from weft.structures.sparse_product import SparseProduct


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 6))


def data(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(96, 10, generator=generator)
    teacher = torch.randn(6, 10, generator=torch.Generator().manual_seed(99))
    return [(part, (part @ teacher.T).argmax(1)) for part in x.split(32)]


TRAINING = Training(epochs=2, learning_rate=0.05, optimiser="sgd")


def stages(result: weft.Result) -> list[dict[str, Any]]:
    return [entry for entry in result.log if "structures" in entry]


@pytest.mark.parametrize("sparsity", [0.5, 0.875, 0.99])
def test_the_schedule_is_the_cubic_one_of_zhu_and_gupta(sparsity: float) -> None:
    first, steps = 0.25, 17
    for step in range(steps + 1):
        published = sparsity + (first - sparsity) * (1 - step / steps) ** 3
        assert cubic(1 - sparsity, step, steps, first=1 - first) == pytest.approx(1 - published, abs=1e-12)
    shares = [cubic(1 - sparsity, step, steps) for step in range(steps + 1)]
    assert shares[0] == 1.0
    assert shares[-1] == 1 - sparsity
    assert all(later < earlier for earlier, later in itertools.pairwise(shares))


def test_densities_follow_the_schedule_and_end_at_the_plan() -> None:
    plan: dict[str, Structure] = {"0": Pruned(0.1), "2": Pruned(0.25)}
    result = IterativePruning(TRAINING, steps=4).run(network(), plan, data())
    for step, stage in enumerate(stages(result), 1):
        for name, last in (("0", 0.1), ("2", 0.25)):
            assert stage["structures"][name] == f"Pruned(density={cubic(last, step, 4)!r})"
    model: Any = result.model
    assert model[0].matrix.structure == Pruned(0.1)
    assert model[0].matrix.values.numel() == 24
    assert isinstance(model[4], nn.Linear)
    bytes_after = [stage["size"] for stage in stages(result)]
    assert bytes_after == sorted(bytes_after, reverse=True)


@pytest.mark.parametrize(
    ("structure", "sizes"),
    [
        (LowRank(2), [4, 2, 2]),  # a share of 0.21 at the end, 0.44 and 0.24 before
        (SparseProduct(2, 2, "splitting"), [4, 2, 2]),
        (Pruned(0.25, pattern="rows"), None),
    ],
    ids=str,
)
def test_the_size_of_every_such_family_falls_to_its_plan(
    structure: Structure, sizes: list[int] | None
) -> None:
    model = network()
    result = IterativePruning(TRAINING, steps=3).run(model, {"2": structure}, data(), validation=data(1))
    found = [weft.structures.from_text(stage["structures"]["2"]) for stage in stages(result)]
    counts = [stage["parameters"] for stage in stages(result)]
    assert counts == sorted(counts, reverse=True)
    assert found[-1] == structure
    if sizes is not None:
        field = "rank" if hasattr(structure, "rank") else "sparsity"
        assert [getattr(one, field) for one in found] == sizes
    assert all("metric" in stage for stage in stages(result))


def test_training_keeps_supports_and_what_is_gone_stays_gone() -> None:
    masks: list[Tensor] = []

    def validation(small: Any) -> float:
        matrix = small[0].matrix
        masks.append(matrix.mask())
        assert torch.equal(matrix.to_dense() != 0, matrix.mask())  # values moved, places did not
        return 0.0

    IterativePruning(TRAINING, steps=4).run(network(), {"0": Pruned(0.2)}, data(), validation=validation)
    assert [int(mask.sum()) for mask in masks] == [round(240 * cubic(0.2, step, 4)) for step in range(1, 5)]
    assert all(bool((later <= earlier).all()) for earlier, later in itertools.pairwise(masks))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layer", [nn.Conv1d, nn.ConvTranspose1d])
def test_every_step_starts_from_what_the_one_before_has_trained(layer: Any, groups: int) -> None:
    """A transposed kernel lies in memory otherwise than its structured matrix: it has to be written back."""
    torch.manual_seed(0)
    model = nn.Sequential(layer(4, 6, 3, groups=groups), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(16, 4, 5)
    model(x)
    batches = [(x, torch.randint(3, (16,)))]
    trained: list[Tensor] = []

    def validation(small: Any) -> float:
        trained.append(small[0].matrix.to_dense().detach().clone())
        return 0.0

    last = Training(learning_rate=1e-12, optimiser="sgd")
    IterativePruning(TRAINING, last, steps=2).run(model, {"0": Pruned(0.3)}, batches, validation=validation)
    after_first, at_the_end = trained[0], trained[-1]
    kept = at_the_end != 0
    assert 0.2 < float(kept.float().mean()) < 0.4
    torch.testing.assert_close(at_the_end[kept], after_first[kept])


def test_the_given_network_stays_as_it_is_and_its_modes_are_kept() -> None:
    model = network().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small, _ = IterativePruning(TRAINING, steps=2).run(
        model, {"0": Pruned(0.2, score="search")}, data(), calibration=[x for x, _ in data()]
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in small.modules())


def test_shared_weights_stay_shared() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 12), nn.Linear(12, 12))
    model[2].weight = model[1].weight
    small, _ = IterativePruning(TRAINING, steps=2).run(model, {"1": LowRank(2)}, data())
    assert small[1].matrix is small[2].matrix


def test_a_family_whose_size_cannot_change_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="structure must be of a size that can change"):
        IterativePruning(TRAINING, steps=2).run(network(), {"0": Quantized(4)}, [])


@pytest.mark.parametrize("steps", [0, -1])
def test_a_schedule_without_steps_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1"):
        IterativePruning(steps=steps)
