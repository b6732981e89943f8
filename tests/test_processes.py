"""Training by two processes on this machine: the result is that of one process, to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from weft.schemes.fine_tune import fine_tune
from weft.schemes.processes import writes_files

SCRIPT = """
import sys

import torch
from torch import nn

import weft
from weft.measure import accuracy
from weft.schemes import training
from weft.schemes.learning_compression import LearningCompression, rising
from weft.schemes.processes import writes_files
from weft.schemes.sharded import Sharded
from weft.schemes.training import Training
from weft.structures.low_rank import LowRank
from weft.structures.pruned import Pruned

folder, fault, sharded = sys.argv[1], sys.argv[2] == "fault", sys.argv[3] == "sharded"
if sharded:  # Accelerate offers FSDP on accelerators only; what it does there, by torch's own means, on gloo
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")

    class Accelerator:
        num_processes, process_index, device = dist.get_world_size(), dist.get_rank(), torch.device("cpu")

        def prepare(self, model, optimiser):
            before = list(model.parameters())
            fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (self.num_processes,)))
            after = dict(zip(map(id, before), model.parameters(), strict=True))
            for group in optimiser.param_groups:
                group["params"] = [after[id(parameter)] for parameter in group["params"]]
            return model, optimiser

        def unwrap_model(self, model):
            return model

        def no_sync(self, model):
            import contextlib
            return contextlib.nullcontext()

        def backward(self, loss):
            loss.backward()

    training.processes = lambda: Sharded(Accelerator())

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)
)
model[4].weight = model[2].weight
x = torch.randn(103, 16)
labels = x[:, :4].argmax(1)
small, _ = weft.compress(model, {"0": LowRank(4), "2": Pruned(0.3)})
loader = torch.utils.data.DataLoader(  # the last batch holds one sample: one of the processes has none
    torch.utils.data.TensorDataset(x, labels), batch_size=17, shuffle=True)
epochs = 0

def validate(network):
    global epochs
    epochs += 1
    if fault and epochs == 2:
        raise SystemExit(3)
    return accuracy(network, [(x, labels)])

tuned, log = weft.fine_tune(
    small, loader, teacher=model, label_share=0.5, epochs=4, learning_rate=0.1, optimiser="sgd", accumulate=2,
    clip=1.0, validation=validate, patience=3, checkpoint=folder, checkpoint_seconds=0, seed=3)
assert tuned[2].matrix is tuned[4].matrix
if writes_files():
    weft.save(tuned, folder + "/tuned.safetensors")
learned, _ = LearningCompression(Training(1, 0.1, optimiser="sgd"), rising(0.1, 3.0, 3)).run(
    model, {"0": LowRank(4), "2": Pruned(0.3)}, loader, checkpoint=folder + "/learned")
if writes_files():
    weft.save(learned, folder + "/learned.safetensors")
"""


def run(tmp_path: Path, folder: str, processes: int, *, fault: bool = False, sharded: bool = False) -> int:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    arguments = [str(tmp_path / folder), "fault" if fault else "whole", "sharded" if sharded else "whole"]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), str(script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=300,
    ).returncode


def assert_agree(one: Path, two: Path) -> None:
    for file in ("tuned.safetensors", "learned.safetensors"):
        tensors, expected = load_file(one / file), load_file(two / file)
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5)
    logs = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (one, two)
    ]
    for entry, other in zip(*logs, strict=True):
        assert entry["step"] == other["step"]
        assert entry.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-4)
        assert entry.get("metric") == other.get("metric")


@pytest.mark.slow  # every process imports torch anew
def test_two_processes_agree_with_one_and_go_on_after_a_fault(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs weft[train]")
    assert run(tmp_path, "one", 1) == 0
    assert run(tmp_path, "two", 2) == 0
    assert_agree(tmp_path / "two", tmp_path / "one")
    assert run(tmp_path, "broken", 2, fault=True) != 0
    assert run(tmp_path, "broken", 2) == 0
    assert_agree(tmp_path / "broken", tmp_path / "two")


@pytest.mark.slow
def test_sharded_weights_come_back_whole(tmp_path: Path) -> None:
    assert run(tmp_path, "one", 1) == 0
    assert run(tmp_path, "broken", 2, fault=True, sharded=True) != 0
    assert run(tmp_path, "broken", 2, sharded=True) == 0
    assert_agree(tmp_path / "broken", tmp_path / "one")


def test_without_accelerate_several_processes_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert not writes_files()
    with pytest.raises(ImportError, match=r"accelerate must be installed for 2 processes, got nothing; pip"):
        fine_tune(nn.Linear(4, 2), [(torch.randn(3, 4), torch.zeros(3).long())])
