"""Files: what is saved comes back bitwise, and what does not fit is refused by name."""

import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weft
from tests.examples import Example, each_example
from weft.layers.replace import replace_layer
from weft.measure import network_cost
from weft.storage import read_metadata, structured_layers, write_beside, write_text
from weft.structures.base import Shape
from weft.structures.dense import Dense
from weft.structures.low_rank import LowRank
from weft.structures.pruned import Pruned


class Network(nn.Module):
    """Convolution, batch norm and linear layers, one of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Linear(8 * 9, 12)
        self.second = nn.Linear(12, 12)
        self.first.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.convolution(x))).flatten(1)
        return self.second(torch.relu(self.first(h)))


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    model = Network()
    model.norm.running_mean.normal_()
    return model.eval()


def compressed(model: nn.Module, structure: Callable[[Shape], Any]) -> nn.Module:
    """The network with random members in every layer, `Dense` included, which `compress` would pass over."""
    small = copy.deepcopy(model)
    for name in ("convolution", "first", "second"):
        weight = model.get_submodule(name).weight
        shape, generator = tuple(weight.shape), torch.Generator().manual_seed(0)
        member = structure(shape).initialise(shape, generator=generator).to(weight.dtype)
        small = replace_layer(small, [name], member)
    return small


def small_network() -> nn.Module:
    return weft.compress(network(), {"convolution": LowRank(2), "second": LowRank(3)}).model


X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def assert_same(got: nn.Module, expected: nn.Module) -> None:
    """Bitwise the same state, in the same dtypes, under the same names."""
    one, other = got.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


# ------------------------------------------------------------------------------------------------------------
# There and back


@each_example
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_save_then_load_gives_bitwise_the_same_network(
    example: Example, dtype: torch.dtype, tmp_path: Path
) -> None:
    small = compressed(network().to(dtype), example.structure)
    path = weft.save(small, tmp_path / "small.safetensors")
    given = network(seed=7).to(dtype)  # other weights of the same architecture
    before = copy.deepcopy(given.state_dict())
    again = weft.load(path, model=given)
    assert_same(again, small)
    with torch.no_grad():
        assert torch.equal(again(X.to(dtype)), small(X.to(dtype)))
    for first, names in structured_layers(small).items():
        assert structured_layers(again)[first] == names
        assert again.get_submodule(first).matrix.structure == small.get_submodule(first).matrix.structure
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["small.safetensors"]


def test_modes_and_frozen_weights_come_from_the_given_model(tmp_path: Path) -> None:
    path = weft.save(compressed(network(), lambda shape: LowRank(2)), tmp_path / "small.safetensors")
    given = network()
    given.norm.train()
    again = weft.load(path, model=given)
    assert [module.training for module in (again, again.norm, again.first)] == [False, True, False]
    assert not any(parameter.requires_grad for parameter in again.first.matrix.parameters())
    assert all(parameter.requires_grad for parameter in again.second.matrix.parameters())


def test_a_dense_network_is_saved_too(tmp_path: Path) -> None:
    model = network()
    assert_same(weft.load(weft.save(model, tmp_path / "dense.safetensors"), model=network(3)), model)


def test_a_bare_layer_is_saved_under_the_empty_name(tmp_path: Path) -> None:
    small = weft.compress(nn.Linear(6, 4), {"": LowRank(2)}).model
    path = weft.save(small, tmp_path / "small.safetensors")
    assert list(read_metadata(path)["plan"]) == [""]
    again = weft.load(path, model=nn.Linear(6, 4))
    assert torch.equal(again(torch.ones(1, 6)), small(torch.ones(1, 6)))


def test_a_precision_other_than_the_given_models_is_that_of_the_file(tmp_path: Path) -> None:
    small = small_network().half()
    again = weft.load(weft.save(small, tmp_path / "small.safetensors"), model=network())
    assert_same(again, small)


def test_shared_tensors_are_stored_once_and_shared_again(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 6)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight
            self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
            self.again = self.block
            self.head = nn.Linear(6, 9)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.again(self.second(self.block(self.first(self.embedding(x))))))

    small, _ = weft.compress(Tied(), {"first": LowRank(2), "block.0": LowRank(3)})
    path = weft.save(small, tmp_path / "small.safetensors")
    stored = load_file(path)
    assert sum(tensor.nbytes for tensor in stored.values()) == network_cost(small).bytes
    assert {"embedding.weight", "first.matrix.left", "block.0.matrix.left"} <= stored.keys()
    assert not {"head.weight", "second.matrix.left", "again.0.matrix.left"} & stored.keys()
    again = weft.load(path, model=Tied())
    assert again.first.matrix is again.second.matrix
    assert again.block is again.again
    assert again.head.weight is again.embedding.weight
    x = torch.tensor([[0, 3, 8]])
    assert torch.equal(again(x), small(x))
    with torch.no_grad():  # still tied: a change shows in both places
        again.embedding.weight += 1
    assert torch.equal(again.head.weight, again.embedding.weight)


def test_empty_and_scalar_tensors_are_kept(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    for name, size in (("none", (0, 3)), ("nothing", (0,)), ("scalar", ())):
        model.register_buffer(name, torch.ones(size))
    small, _ = weft.compress(model, {"0": LowRank(1)})
    assert_same(weft.load(weft.save(small, tmp_path / "small.safetensors"), model=model), small)


def test_extra_state_that_is_a_tensor_is_kept(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        count = torch.zeros(())

        def get_extra_state(self) -> Tensor:
            return self.count + 0

        def set_extra_state(self, state: Tensor) -> None:
            self.count = state

    model = nn.Sequential(nn.Linear(4, 4), Counting(4, 4))
    model[1].count = torch.tensor(3.0)
    path = weft.save(model, tmp_path / "file.safetensors")
    assert weft.load(path, model=nn.Sequential(nn.Linear(4, 4), Counting(4, 4)))[1].count == 3


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    path = weft.save(small_network(), tmp_path / "small.safetensors", source="file.py:make")
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    assert (metadata["format"], metadata["format_version"], metadata["source"]) == (
        "weft",
        "1",
        "file.py:make",
    )
    assert json.loads(metadata["plan"])["convolution"] == {
        "names": ["convolution"],
        "structure": {"family": "LowRank", "rank": 2},
        "shape": [8, 3, 3, 3],
    }
    assert read_metadata(path)["plan"].keys() == {"convolution", "second"}


# ------------------------------------------------------------------------------------------------------------
# Rebuilding from the recorded source


def test_the_recorded_source_rebuilds_the_network_without_a_model(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text("from tests.test_storage import Network\n\n\ndef make():\n    return Network()\n")
    small = small_network()
    path = weft.save(small, tmp_path / "small.safetensors", source=f"{script}:make")
    again = weft.load(path)
    assert_same(again, small)
    assert not any(module.training for module in again.modules())


def test_without_source_and_model_the_remedy_is_named(tmp_path: Path) -> None:
    path = weft.save(small_network(), tmp_path / "small.safetensors")
    with pytest.raises(
        ValueError, match=r"records no source; pass the network, weft\.load\(path, model=\.\.\.\)"
    ):
        weft.load(path)


# ------------------------------------------------------------------------------------------------------------
# Never half-written


def test_a_failure_while_writing_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = weft.save(small_network(), tmp_path / "small.safetensors")
    old = path.read_bytes()

    def break_off(tensors: object, beside: Path, metadata: object) -> None:
        beside.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("weft.storage.save_file", break_off)
    with pytest.raises(OSError, match="no space left"):
        weft.save(network(), path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["small.safetensors"]


def test_a_process_killed_before_the_rename_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "file.json", "old")
    script = f"""
        import os, signal
        from pathlib import Path
        from weft.storage import write_text
        Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
        write_text({str(path)!r}, "new")
    """
    environment = {**os.environ, "WEFT_KERNELS": "reference"}
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_text(path, "newer")
    assert path.read_text() == "newer"


def test_the_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="path must be in an existing folder, got .*; create the folder first"
    ):
        weft.save(small_network(), tmp_path / "none" / "small.safetensors")


def test_a_folder_in_the_files_place_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        write_text(tmp_path, "text")
    assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.parent.glob("*.part")) == []


def test_write_beside_gives_the_writer_another_name_in_the_same_folder(tmp_path: Path) -> None:
    seen: list[Path] = []

    def write(beside: Path) -> None:
        seen.append(beside)
        assert not (tmp_path / "file").exists()
        beside.write_text("whole")

    assert write_beside(tmp_path / "file", write).read_text() == "whole"
    assert seen[0].parent == tmp_path
    assert seen[0].name != "file"


def test_what_is_no_tensor_is_refused_by_name(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

        def set_extra_state(self, state: object) -> None:
            pass

    with pytest.raises(TypeError, match="state dict entry 0._extra_state must be a tensor, got dict"):
        weft.save(nn.Sequential(Extra(2, 2)), tmp_path / "small.safetensors")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------
# Refused by name


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return weft.save(small_network(), tmp_path / "small.safetensors")


def rewritten(path: Path, *, tensors: dict[str, Tensor | None] | None = None, **metadata: str | None) -> Path:
    """The same file with tensors or metadata replaced, or removed where None."""
    with safe_open(path, framework="pt") as opened:
        old = opened.metadata()
    changed = {**load_file(path), **(tensors or {})}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, path, {name: text for name, text in {**old, **metadata}.items() if text is not None})
    return path


@pytest.mark.parametrize("length", [0, 4, 20, 1000, -1])
def test_a_truncated_file_is_refused(saved: Path, length: int) -> None:
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"small\.safetensors must be a whole safetensors file"):
        weft.load(saved, model=network())


def test_other_versions_and_other_files_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="must be of format version 1 or 2, got version '3'; use the weft that wrote it"
    ):
        weft.load(rewritten(saved, format_version="3"), model=network())
    plain = tmp_path / "plain.safetensors"
    save_file({"weight": torch.ones(2)}, plain)
    with pytest.raises(ValueError, match=r"plain\.safetensors must be a file written by weft\.save"):
        weft.load(plain, model=network())
    with pytest.raises(FileNotFoundError, match=r"path must be an existing file, got .*none\.safetensors"):
        weft.load(tmp_path / "none.safetensors", model=network())
    with pytest.raises(FileNotFoundError, match="path must be an existing file"):
        weft.load(tmp_path, model=network())


@pytest.mark.parametrize("name", ["plan", "aliases"])
@pytest.mark.parametrize("text", [None, "{", "[1]"], ids=["missing", "no JSON", "no dictionary"])
def test_damaged_metadata_are_refused(saved: Path, name: str, text: str | None) -> None:
    with pytest.raises(ValueError, match=rf"metadata {name} of .* must be a JSON dictionary"):
        weft.load(rewritten(saved, **{name: text}), model=network())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"structure": {"family": "Unheard"}}, "layer second of .*family must be one of .* got 'Unheard'"),
        ({"structure": {"family": "LowRank", "rank": 0}}, "layer second of .*rank must be at least 1"),
        ({"structure": {"family": "LowRank", "rank": 99}}, "layer second of .*rank must be between 1 and 12"),
        ({"structure": {"family": "LowRank", "rank": "3"}}, "layer second of .*rank must be a whole number"),
        ({"structure": 3}, "layer second of .*structure must be a dictionary"),
        ({"shape": [12, 13]}, r"layer second of .* must be of shape \(12, 13\), got \(12, 12\) in the model"),
        ({"names": ["third"]}, "layer third of .* must be a layer of the model, got none"),
    ],
)
def test_an_edited_plan_is_refused_by_layer(saved: Path, entry: dict[str, Any], message: str) -> None:
    plan = read_metadata(saved)["plan"]
    plan["second"] |= entry
    with pytest.raises(ValueError, match=message):
        weft.load(rewritten(saved, plan=json.dumps(plan)), model=network())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"second.matrix.left": None}, "layer second of .*missing: left"),
        ({"second.matrix.middle": torch.ones(2)}, "layer second of .*surplus: middle"),
        (
            {"second.matrix.left": torch.ones(12, 2)},
            r"layer second of .*left must be of shape \(12, 3\), got \(12, 2\)",
        ),
        ({"first.weight": None}, "tensors of .* must be those of the model, got missing: first.weight"),
        ({"more": torch.ones(2)}, "tensors of .* must be those of the model, got surplus: more"),
        (
            {"first.bias": torch.ones(5)},
            r"tensor first.bias of .* must be of shape \(12,\), got \(5,\) in the file",
        ),
    ],
)
def test_missing_surplus_and_misshapen_tensors_are_refused(
    saved: Path, tensors: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        weft.load(rewritten(saved, tensors=tensors), model=network())


def test_a_model_that_does_not_fit_is_refused_and_not_changed(saved: Path) -> None:
    other = network()
    other.second = nn.Linear(12, 10)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ValueError, match=r"layer second of .* must be of shape \(12, 12\), got \(10, 12\) in the model"
    ):
        weft.load(saved, model=other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(ValueError, match="layer convolution of .* must be a layer of the model, got none"):
        weft.load(saved, model=nn.Sequential(nn.Linear(3, 3)))


def test_a_model_that_is_compressed_already_is_told_so(saved: Path) -> None:
    with pytest.raises(
        ValueError, match="layer convolution of .* got one that stays dense, because it is compressed"
    ):
        weft.load(saved, model=small_network())


def test_dense_members_of_a_plan_load_too(tmp_path: Path) -> None:
    small = compressed(network(), lambda shape: Dense())
    assert_same(weft.load(weft.save(small, tmp_path / "file.safetensors"), model=network(2)), small)


# ------------------------------------------------------------------------------------------------------------
# Entropy coding


@pytest.fixture(params=["range", "huffman"])
def coder(request: pytest.FixtureRequest) -> str:
    if request.param == "range":
        pytest.importorskip("constriction")
    return request.param


def pruned_network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 3))
    return weft.compress(model, {"0": Pruned(0.1)}).model.eval()


def dense_of_pruned() -> nn.Module:
    return nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 3)).eval()


def test_a_coded_file_is_smaller_and_loads_bitwise_the_same(tmp_path: Path, coder: str) -> None:
    small = pruned_network()
    plain = weft.save(small, tmp_path / "plain.safetensors")
    coded = weft.save(small, tmp_path / "coded.safetensors", entropy_coding=coder)
    assert coded.stat().st_size < 0.95 * plain.stat().st_size
    again = weft.load(coded, model=dense_of_pruned())
    assert_same(again, small)
    assert torch.equal(again(torch.ones(2, 200)), small(torch.ones(2, 200)))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["coded.safetensors", "plain.safetensors"]


@each_example
def test_every_family_is_coded_and_comes_back(example: Example, tmp_path: Path) -> None:
    small = compressed(network(), example.structure)
    path = weft.save(small, tmp_path / "small.safetensors", entropy_coding="huffman")
    assert_same(weft.load(path, model=network(seed=7)), small)


def test_small_tensors_that_would_grow_are_stored_as_they_are(tmp_path: Path, coder: str) -> None:
    model = nn.Linear(2, 2)
    path = weft.save(model, tmp_path / "tiny.safetensors", entropy_coding=coder)
    assert read_metadata(path)["coding"] == "{}"
    assert_same(weft.load(path, model=nn.Linear(2, 2)), model)


def test_damage_inside_a_coded_tensor_is_refused_by_name(tmp_path: Path, coder: str) -> None:
    path = weft.save(pruned_network(), tmp_path / "coded.safetensors", entropy_coding=coder)
    data = bytearray(path.read_bytes())
    data[-200] ^= 0xFF  # the tensors stand at the end of the file
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tensor .* must be whole, got .*write it again with weft.save"):
        weft.load(path, model=dense_of_pruned())
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        weft.load(path, model=dense_of_pruned())


@pytest.mark.parametrize("text", ["[]", "{", '{"0.bias": 3}', '{"0.matrix.values": ["strange", [2000]]}'])
def test_damaged_coding_is_refused(tmp_path: Path, text: str) -> None:
    path = weft.save(pruned_network(), tmp_path / "coded.safetensors", entropy_coding="huffman")
    with safe_open(path, framework="pt") as opened:
        metadata = {**opened.metadata(), "coding": text}
    save_file(load_file(path), path, metadata)
    with pytest.raises(ValueError, match="the file is damaged"):
        weft.load(path, model=dense_of_pruned())


def test_an_unknown_coder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="entropy_coding must be one of 'range', 'huffman'"):
        weft.save(network(), tmp_path / "x.safetensors", entropy_coding="zip")
    assert not list(tmp_path.iterdir())
