"""A run of any scheme that is cut off, at any moment and in any way, goes on to the same network and log."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import weft
from weft.plan.budget import Price
from weft.schemes.fine_tune import FineTune
from weft.schemes.from_scratch import FromScratch
from weft.schemes.iterative_pruning import IterativePruning
from weft.schemes.learning_compression import Added, LearningCompression, Priced, Together, rising
from weft.schemes.log import read_log
from weft.schemes.training import Training
from weft.structures.base import Structure
from weft.structures.low_rank import LowRank
from weft.structures.pruned import Pruned
from weft.structures.sparse_product import SparseProduct

TRAINING = Training(epochs=2, learning_rate=0.05, optimiser="sgd")
PLAN: dict[str, Structure] = {"0": Pruned(0.2), "2": SparseProduct(2, 2, "splitting")}
TASKS = {"0": Added((Together(Pruned(0.1)), LowRank(1))), "2": Priced("LowRank", Price(parameters=1e-4))}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 6))


def data() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(96, 10, generator=torch.Generator().manual_seed(0))
    return [(part, part[:, :6].argmax(1)) for part in x.split(32)]


Run = Callable[..., weft.Result]
SCHEMES: dict[str, Run] = {
    "fine-tuning": lambda **options: FineTune(TRAINING).run(network(), data(), **options),
    "from scratch": lambda **options: FromScratch(FineTune(TRAINING), "supports").run(
        network(), PLAN, data(), **options
    ),
    "learning-compression": lambda **options: LearningCompression(TRAINING, rising(3e-2, 2.0, 4)).run(
        network(), TASKS, data(), **options
    ),
    "iterative pruning": lambda **options: IterativePruning(
        TRAINING, Training(epochs=1, learning_rate=0.01), steps=3
    ).run(network(), PLAN, data(), **options),
}


class KilledError(Exception):
    pass


@pytest.mark.parametrize("kill_at", [0, 1])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_run_that_breaks_off_goes_on_to_the_same_network(tmp_path: Path, scheme: Run, kill_at: int) -> None:
    def run(folder: Path | None, kill_at: int | None = None) -> weft.Result:
        calls = itertools.count()

        def validation(_: nn.Module) -> float:
            if next(calls) == kill_at:
                raise KilledError
            return 0.0

        return scheme(validation=validation, checkpoint=folder, checkpoint_seconds=0.0)

    def entries(result: weft.Result) -> list[dict[str, Any]]:
        return [{name: value for name, value in entry.items() if name != "seconds"} for entry in result.log]

    whole = run(None)
    with pytest.raises(KilledError):
        run(tmp_path / "killed", kill_at)
    again = run(tmp_path / "killed")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert entries(again) == entries(whole)
    assert run(tmp_path / "killed").log == again.log  # a finished run is not run again


SCRIPT = """
import sys, time, torch, weft
from pathlib import Path
from torch import nn
from weft.measure import accuracy
from weft.plan.budget import Price
from weft.schemes.iterative_pruning import IterativePruning
from weft.schemes.learning_compression import LearningCompression, Priced, rising
from weft.schemes.training import Training
from weft.structures.quantized import Quantized
from weft.structures.low_rank import LowRank
from weft.structures.pruned import Pruned

torch.manual_seed(0)
folder, wait = Path(sys.argv[1]), float(sys.argv[2])
folder.mkdir(exist_ok=True)
model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 4))
x = torch.randn(200, 16)
loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(x, x[:, :4].argmax(1)), batch_size=20, shuffle=True)

def slow(model):
    time.sleep(wait)
    return accuracy(model, [(x, x[:, :4].argmax(1))], shown=False)

def kept(name):
    return {"validation": slow, "checkpoint": folder / name, "checkpoint_seconds": 0}

small, _ = weft.compress(model, {"0": LowRank(4), "4": Quantized(3)})
tuned, _ = weft.fine_tune(small, loader, teacher=model, label_share=0.5, epochs=12, learning_rate=1e-2,
    patience=9, **kept("tuned"))
weft.save(tuned, folder / "tuned.safetensors")
training = Training(2, 0.05, optimiser="sgd")
learned, _ = LearningCompression(training, rising(1e-2, 3.0, 3)).run(
    model, {"0": Pruned(0.3), "4": Priced("LowRank", Price(parameters=1e-4))}, loader, **kept("learned"))
weft.save(learned, folder / "learned.safetensors")
pruned, _ = IterativePruning(training, steps=3).run(
    model, {"0": Pruned(0.2), "4": LowRank(2)}, loader, **kept("pruned"))
weft.save(pruned, folder / "pruned.safetensors")
"""


def test_a_run_killed_at_any_moment_gives_bitwise_the_same_network(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def start(folder: str, wait: float) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), str(tmp_path / folder), str(wait)]
        return subprocess.Popen(command, text=True, env=environment)

    assert start("whole", 0).wait() == 0
    # Killed as soon as a log has grown so far: within fine-tuning, an L step, and a pruning step.
    for scheme, lines in (("tuned", 5), ("tuned", 77), ("learned", 31), ("pruned", 27)):
        log = tmp_path / "killed" / scheme / "log.jsonl"
        process = start("killed", 0.05)
        while process.poll() is None and not (log.is_file() and log.read_bytes().count(b"\n") >= lines):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start("killed", 0).wait() == 0
    for scheme in ("tuned", "learned", "pruned"):
        tensors, expected = (
            load_file(tmp_path / run / f"{scheme}.safetensors") for run in ("killed", "whole")
        )
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensors[name], tensor), (scheme, name)
        logs = [
            [entry.get("loss") for entry in read_log(tmp_path / run / scheme / "log.jsonl")]
            for run in ("killed", "whole")
        ]
        assert logs[0] == logs[1]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_scheme_writes_the_same_log(tmp_path: Path, scheme: Run) -> None:
    result = scheme(validation=lambda _: 0.5, log=tmp_path / "log.jsonl")
    entries = read_log(tmp_path / "log.jsonl")
    assert entries == result.log
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(len(steps)))
    assert all({"epoch", "size", "seconds"} <= entry.keys() for entry in steps)
    metrics = [entry for entry in entries if "metric" in entry]
    assert metrics
    assert all({"step", "size", "seconds"} <= entry.keys() for entry in metrics)
    times = [entry["seconds"] for entry in entries]
    assert times == sorted(times)
