"""Checkpoints in shards: read layer by layer, compressed into shards, loaded again; faults are named."""

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weft
from weft import Budget, allocate
from weft.checkpoint import INDEX, Checkpoint
from weft.numerics import svd
from weft.schemes import shards
from weft.schemes.shards import compress_shards
from weft.structures import base
from weft.structures.dense import Dense
from weft.structures.low_rank import LowRank
from weft.structures.quantized import Quantized
from weft.survey import survey_shards

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Net(nn.Module):
    """What a checkpoint holds: a table tied to the head, convolutions, norms, a buffer of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.norm = nn.BatchNorm2d(6)
        self.body = nn.Sequential(nn.Linear(6 * 14 * 14, 20), nn.ReLU(), nn.Linear(20, 16))
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, indices: Tensor) -> Tensor:
        x = self.table(indices).unsqueeze(1).expand(-1, 2, -1, -1)  # (batch, 2, 16, 16)
        x = self.norm(self.depthwise(self.first(x)))
        return self.head(self.body(x.flatten(1)))


PLAN = {"table": Quantized(4), "first": LowRank(2), "body.0": LowRank(5), "body.2": Quantized(8)}


def network(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().eval().to(dtype)


def write_shards(model: nn.Module, folder: Path, count: int = 3) -> Path:
    """As Hugging Face writes it: what is tied is stored once, under its first name."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    places: dict[str, str] = {}
    names = list(tensors)
    for number in range(count):
        own = names[number * len(names) // count : (number + 1) * len(names) // count]
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(own, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(network(), tmp_path / "dense")


def same(one: nn.Module, two: nn.Module) -> bool:
    own, other = one.state_dict(), two.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def test_layers_are_the_weights_of_two_and_four_axes(folder: Path) -> None:
    found = survey_shards(folder)
    assert {name: layer.shape for name, layer in found.layers.items()} == {
        "table": (40, 16),
        "first": (6, 2, 3, 3),
        "body.0": (20, 1176),
        "body.2": (16, 20),
    }
    model = network()
    assert found.left_dense == {"depthwise": "its channels have a kernel each (depthwise)"}
    counted = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values()
    assert found.total.bytes == sum(tensor.nbytes for tensor in counted)
    assert found.total.parameters == sum(tensor.numel() for tensor in counted if tensor.is_floating_point())
    assert list(survey_shards(folder, layers="body.*.weight").layers) == ["body.0", "body.2"]
    assert all(layer.weight.is_meta for layer in found.layers.values())
    for name, layer in found.layers.items():
        assert torch.equal(layer.read().weight, model.get_parameter(f"{name}.weight"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compressed_checkpoint_is_the_compressed_model(dtype: torch.dtype, tmp_path: Path) -> None:
    model = network(dtype)
    folder = write_shards(model, tmp_path / "dense")
    log = compress_shards(folder, PLAN, tmp_path / "small")
    loaded = weft.load(tmp_path / "small", model=model)
    expected, expected_log = weft.compress(model, PLAN)
    assert same(loaded, expected)
    assert [entry["structure"] for entry in log] == [PLAN[entry["layer"]].to_json() for entry in log]
    errors = {entry["layer"]: entry["error"] for entry in expected_log}
    assert {entry["layer"]: entry["error"] for entry in log} == pytest.approx(errors, rel=1e-12)
    assert loaded.head.matrix is loaded.table.matrix  # as the model ties them
    indices = torch.arange(16)[None]
    torch.testing.assert_close(loaded(indices), expected(indices))


def test_plans_are_those_of_the_model_itself(folder: Path) -> None:
    found, plain = survey_shards(folder), weft.survey(network())
    budget = Budget(bytes=0.5)
    plan = allocate(found, "LowRank", budget)
    assert plan.total is not None
    assert plan.total.bytes <= 0.5 * found.total.bytes
    same_layers = {name: layer for name, layer in plain.layers.items() if name in found.layers}
    assert {name: plan.expected[name].error for name in plan} == {
        name: pytest.approx(point.error)
        for name, point in allocate(
            weft.Survey(same_layers, {}, found.total), "LowRank", budget
        ).expected.items()
    }
    for sent in (2, 1):
        assert allocate(found, "LowRank", budget, workers=sent) == plan


def test_a_single_file_is_a_checkpoint_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 8))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for given in (tmp_path, tmp_path / "model.safetensors"):
        compress_shards(given, {"0": LowRank(2)}, tmp_path / "small")
        assert same(weft.load(tmp_path / "small", model=model), weft.compress(model, {"0": LowRank(2)}).model)
        shutil.rmtree(tmp_path / "small")


def test_layers_left_dense_and_other_tensors_are_copied(folder: Path, tmp_path: Path) -> None:
    assert compress_shards(folder, {"table": Dense()}, tmp_path / "same") == []
    assert same(weft.load(tmp_path / "same", model=network()), network())


def test_entropy_coded_shards_are_read_again(folder: Path, tmp_path: Path) -> None:
    compress_shards(folder, {"body.0": Quantized(4)}, tmp_path / "coded", entropy_coding="huffman")
    compress_shards(folder, {"body.0": Quantized(4)}, tmp_path / "plain")
    sizes = [
        sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors"))
        for name in ("coded", "plain")
    ]
    assert sizes[0] < sizes[1]
    assert same(
        weft.load(tmp_path / "coded", model=network()), weft.load(tmp_path / "plain", model=network())
    )


def test_finished_shards_are_not_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    plan = {"table": Quantized(4), "body.0": LowRank(5), "body.2": Quantized(8)}
    whole = compress_shards(folder, plan, small)
    content = {file.name: file.read_bytes() for file in small.iterdir()}
    shutil.rmtree(small)
    fitted: list[str] = []
    stop = [True]
    fit = shards.fit_piece

    def stops(piece: Any) -> Any:
        fitted.append(piece.layer.name)
        if fitted == ["table", "body.0"] and stop:
            stop.clear()
            raise SystemExit
        return fit(piece)

    monkeypatch.setattr(shards, "fit_piece", stops)
    with pytest.raises(SystemExit):
        compress_shards(folder, plan, small)
    assert not (small / INDEX).exists()
    assert not list(small.glob(".*"))
    with pytest.raises(FileNotFoundError, match=INDEX):
        weft.load(small, model=network())
    log = compress_shards(folder, plan, small)
    assert fitted == ["table", "body.0", "body.0", "body.2"]
    assert [entry["layer"] for entry in log] == [entry["layer"] for entry in whole]
    assert same(weft.load(small, model=network()), weft.compress(network(), plan).model)
    assert {file.name for file in small.iterdir()} == set(content)
    # Another plan makes those shards again that it changes, another checkpoint all of them.
    fitted.clear()
    compress_shards(folder, {**plan, "table": Quantized(5)}, small)
    assert fitted == ["table"]
    shutil.rmtree(folder)
    write_shards(network(), folder)
    fitted.clear()
    compress_shards(folder, plan, small)
    assert fitted == ["table", "body.0", "body.2"]


def test_shards_are_cut_where_they_grow_too_large(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 4 * 40 * 16)
    compress_shards(folder, {"table": LowRank(3)}, tmp_path / "small")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 3
    assert same(
        weft.load(tmp_path / "small", model=network()), weft.compress(network(), {"table": LowRank(3)}).model
    )


def truncate(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-5])


def lose_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def change_index(folder: Path, change: Any) -> None:
    data = json.loads((folder / INDEX).read_text())
    change(data["weight_map"])
    (folder / INDEX).write_text(json.dumps(data))


FAULTS = {
    "truncated": (truncate, ValueError, "00002-of-00003.safetensors must be a whole safetensors file"),
    "missing shard": (
        lose_a_shard,
        FileNotFoundError,
        "00002-of-00003.safetensors must be a file that exists, got none, and .* is in it; download",
    ),
    "tensor that the index lacks": (
        lambda folder: change_index(folder, lambda places: places.pop("table.weight")),
        ValueError,
        "must be what model.safetensors.index.json says, got .*table.weight",
    ),
    "tensor that the shard lacks": (
        lambda folder: change_index(folder, lambda places: places.update(more=places["table.weight"])),
        ValueError,
        "must be what model.safetensors.index.json says, got .*more",
    ),
    "no JSON": (lambda folder: (folder / INDEX).write_text("{"), ValueError, '"weight_map"'),
    "other JSON": (lambda folder: (folder / INDEX).write_text("[]"), ValueError, '"weight_map"'),
    "no index": (lambda folder: (folder / INDEX).unlink(), ValueError, "3 files without an index"),
    "no folder": (shutil.rmtree, FileNotFoundError, "shards must be an existing folder"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_is_named(fault: str, folder: Path) -> None:
    damage, kind, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(kind, match=message):
        survey_shards(folder)


@pytest.mark.parametrize("fault", ["truncated", "missing shard", "no index"])
def test_a_broken_compressed_checkpoint_is_named(fault: str, folder: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    compress_shards(folder, {"body.0": LowRank(2)}, small)
    damage, _, message = FAULTS[fault]
    damage(small)
    kind, message = (FileNotFoundError, INDEX) if fault == "no index" else (FAULTS[fault][1], message)
    with pytest.raises(kind, match=message):
        weft.load(small, model=network())


def test_what_cannot_be_done_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layer nowhere must be one .*, got not in the model"):
        compress_shards(folder, {"nowhere": LowRank(2)}, tmp_path / "small")
    with pytest.raises(ValueError, match="output must be another folder than the checkpoint's"):
        compress_shards(folder, {"table": LowRank(2)}, folder)
    with pytest.raises(ValueError, match="shards must be with weights of .*, got none like 'x'"):
        survey_shards(folder, layers="x")
    compress_shards(folder, {"table": LowRank(2)}, tmp_path / "small")
    with pytest.raises(ValueError, match="must be dense, got one that weft wrote"):
        survey_shards(tmp_path / "small")
    other = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="layer table .* must be a layer of the model"):
        weft.load(tmp_path / "small", model=other)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model.body[2].weight[3, 4] = torch.nan
    write_shards(model, tmp_path / "dense")
    with pytest.raises(ValueError, match=r"weight of layer body.2 must be finite everywhere, got 1 NaN"):
        survey_shards(tmp_path / "dense")


def test_dtypes_that_cannot_be_compressed_are_copied(tmp_path: Path) -> None:
    tensors = {
        "eight.weight": torch.randn(6, 4).to(torch.float8_e4m3fn),
        "codes.weight": torch.arange(24, dtype=torch.int8).reshape(6, 4),
        "a.weight": torch.randn(6, 4),
        "cube.weight": torch.randn(2, 3, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = survey_shards(tmp_path)
    assert found.left_dense == {
        "eight": "its weight is F8_E4M3",
        "codes": "its weight is I8",
        "cube": "its weight has 3 axes",
    }
    assert found.total.bytes == 24 + 24 + 96 + 96
    compress_shards(tmp_path, {"a": LowRank(1)}, tmp_path / "small")
    copied = load_file(next((tmp_path / "small").glob("*.safetensors")))
    for name in ("eight.weight", "codes.weight", "cube.weight"):
        assert copied[name].dtype == tensors[name].dtype
        assert torch.equal(copied[name].view(torch.uint8), tensors[name].view(torch.uint8))


# ------------------------------------------------------------------------------------------------------------
# Memory

MIB = 2**20


def _status(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry))


def _peaks(dense: Path, small: Path) -> dict[str, int]:
    """By how many bytes memory grew at most, layer by layer and with all layers at once."""
    torch.set_num_threads(1)
    shards.SHARD_BYTES, svd._NUMBERS_AT_A_TIME, base._NUMBERS_AT_A_TIME = 8 * MIB, 2**18, 2**18  # noqa: SLF001

    def layer_by_layer(folder: Path = dense) -> None:
        found = survey_shards(folder)
        plan = allocate(found, "LowRank", Budget(bytes=0.3))
        compress_shards(folder, plan, small.with_name(f"{folder.name} small"), survey=found)

    def at_once() -> None:
        held = [tensor.read() for tensor in Checkpoint(dense).tensors.values()]
        assert all(torch.isfinite(tensor.sum()) for tensor in held)

    tiny = small.with_name("tiny")
    tiny.mkdir()
    save_file({"0.weight": torch.randn(256, 256)}, tiny / "model.safetensors")
    layer_by_layer(tiny)  # what libraries take at their first call
    peaks = {}
    for work in (layer_by_layer, at_once):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        work()
        peaks[work.__name__] = _status("VmHWM") - before
    return peaks


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks as Linux tells them")
def test_memory_is_three_times_the_largest_layer_and_a_constant(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = {"table": (65536, 64)} | {f"blocks.{index}": (64, 32768) for index in range(24)}
    model = nn.ModuleDict({
        name.replace(".", "_"): nn.Linear(shape[1], shape[0], bias=False) for name, shape in shapes.items()
    })
    dense = write_shards(model, tmp_path / "dense", count=2)
    sizes = [4 * rows * columns for rows, columns in shapes.values()]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        peaks = pool.submit(_peaks, dense, tmp_path / "small").result()
    law = 3 * max(sizes) + 48 * MIB
    assert peaks["at_once"] > 1.5 * law  # what the law forbids is seen
    assert peaks["layer_by_layer"] < law
