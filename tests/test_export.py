"""Exported networks compute what the network computes, at any batch size, without weft."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import weft
from tests.examples import EXAMPLES, Example
from weft.export import check_onnx, export_onnx, export_torch
from weft.export.torch_export import trace
from weft.layers.linear import StructuredLinear
from weft.structures.base import Structure
from weft.structures.low_rank import LowRank

ONE_EXAMPLE = "low_rank"
SHAPE = (40, 48)


def convolutional() -> nn.Module:
    """Every way in which a convolution can meet its input, and two linear layers, compressed."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", dilation=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, (2, 3), padding="same", padding_mode="circular"),
        nn.Dropout(0.5),
        nn.Conv2d(8, 4, 3, stride=(1, 2), padding=(1, 0), padding_mode="replicate"),
        nn.Flatten(),
        nn.Linear(64, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    )
    model(torch.randn(32, 3, 16, 12))  # batch-norm statistics other than 0 and 1
    ranks = {"0": 4, "3": 4, "5": 4, "7": 4, "9": 2, "11": 8, "13": 3}
    return weft.compress(model, {name: LowRank(rank) for name, rank in ranks.items()}).model


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 16, 12, generator=torch.Generator().manual_seed(batch))


def layer_of(structure: Structure) -> StructuredLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator)
    return StructuredLinear(structure.fit(weight), torch.randn(SHAPE[0], generator=generator))


def reloaded(path: Path) -> nn.Module:
    return torch.export.load(path).module()


def outputs(model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(*inputs)


@pytest.mark.parametrize("batch", [1, 4], ids=["traced with one image", "traced with four"])
def test_a_convolutional_network_runs_in_onnxruntime_at_any_batch_size(tmp_path: Path, batch: int) -> None:
    model = convolutional()
    path = export_onnx(model, images(batch), tmp_path / "small.onnx")
    for size in (1, 2, 7):
        assert check_onnx(path, model, images(size)) <= 1e-4
    assert model.training  # exported in evaluation mode, left as it was
    assert [file.name for file in tmp_path.iterdir()] == ["small.onnx"]


def test_a_convolutional_network_runs_as_a_program_at_any_batch_size(tmp_path: Path) -> None:
    model = convolutional()
    program = reloaded(export_torch(model, images(3), tmp_path / "small.pt2"))
    assert model.training
    model.eval()
    for size in (1, 2, 7):
        torch.testing.assert_close(outputs(program, images(size)), outputs(model, images(size)))


def test_a_program_holds_operations_of_torch_alone() -> None:
    program = trace(convolutional(), images(2))
    operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.linear.default" in operations
    assert not [name for name in operations if "weft" in name]


@pytest.mark.slow
def test_a_program_runs_without_weft(tmp_path: Path) -> None:
    layer = layer_of(LowRank(rank=4))
    export_torch(layer, torch.randn(2, 48), tmp_path / "layer.pt2")
    torch.save(torch.ones(3, 48), tmp_path / "x.pt")
    code = (
        "import sys, torch; sys.modules['weft'] = None; folder = sys.argv[1];"
        "y = torch.export.load(folder + '/layer.pt2').module()(torch.load(folder + '/x.pt'));"
        "torch.save(y.detach(), folder + '/y.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=tmp_path, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), outputs(layer, torch.ones(3, 48)))


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(one, id=one.name, marks=[] if one.name == ONE_EXAMPLE else pytest.mark.slow)
        for one in EXAMPLES
    ],
)
def test_every_family_exports(tmp_path: Path, example: Example) -> None:
    layer, x = layer_of(example.structure(SHAPE)), torch.randn(4, 48)
    path = export_onnx(layer, x, tmp_path / "layer.onnx")
    assert check_onnx(path, layer, x) <= 1e-4
    program = reloaded(export_torch(layer, x, tmp_path / "layer.pt2"))
    for size in (1, 6):
        inputs = torch.randn(size, 48)
        torch.testing.assert_close(outputs(program, inputs), outputs(layer, inputs), rtol=1e-4, atol=1e-5)


def test_a_bare_dense_layer_exports(tmp_path: Path) -> None:
    model = nn.Linear(6, 4)
    path = export_onnx(model, torch.randn(2, 5, 6), tmp_path / "dense.onnx")  # two batch axes
    assert check_onnx(path, model, torch.randn(3, 5, 6)) <= 1e-4


def test_a_transformer_layer_exports(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = weft.compress(dense, {"linear1": LowRank(rank=4), "linear2": LowRank(rank=4)}).model.eval()
    path = export_onnx(model, torch.randn(2, 5, 16), tmp_path / "layer.onnx")
    assert check_onnx(path, model, torch.randn(3, 5, 16)) <= 1e-4


def test_the_file_holds_the_factors_and_not_the_dense_weight(tmp_path: Path) -> None:
    layer = StructuredLinear(LowRank(rank=3).fit(torch.randn(200, 300)))
    path = export_onnx(layer, torch.randn(2, 300), tmp_path / "layer.onnx")
    shapes = [tuple(tensor.dims) for tensor in onnx.load(path).graph.initializer]
    assert (200, 300) not in shapes
    assert {(200, 3), (3, 300)} <= set(shapes)
    assert path.stat().st_size < 2 * layer.matrix.cost().bytes


def test_the_file_names_the_batch_axis_and_no_folder_of_this_machine(tmp_path: Path) -> None:
    path = export_onnx(layer_of(LowRank(rank=4)), torch.randn(2, 48), tmp_path / "layer.onnx")
    graph = onnx.load(path).graph
    assert [axis.dim_param for axis in graph.input[0].type.tensor_type.shape.dim] == ["batch", ""]
    assert str(Path(weft.__file__).parent).encode() not in path.read_bytes()


class Masked(nn.Module):
    """Takes arguments by name, one of them without a batch axis, and returns several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor, shift: Tensor | None = None) -> dict[str, Tensor]:
        y = self.linear(x * mask)
        return {"y": y if shift is None else y + shift, "mean": y.mean(0)}


@pytest.mark.parametrize(
    "sample",
    [
        (torch.randn(4, 6), torch.randn(6)),
        {"x": torch.randn(4, 6), "mask": torch.randn(6)},
        {"x": torch.randn(4, 6), "shift": torch.randn(4, 6), "mask": torch.randn(6)},
    ],
    ids=["tuple", "dictionary", "another order"],
)
def test_samples_are_passed_as_the_model_takes_them(tmp_path: Path, sample) -> None:
    model = Masked()
    path = export_onnx(model, sample, tmp_path / "masked.onnx")
    assert check_onnx(path, model, sample) <= 1e-4


def test_a_fixed_batch_is_checked_at_its_own_size(tmp_path: Path) -> None:
    model, x = nn.Linear(6, 4), torch.randn(3, 6)
    path = export_onnx(model, x, tmp_path / "fixed.onnx", dynamic_batch=False)
    assert [axis.dim_value for axis in onnx.load(path).graph.input[0].type.tensor_type.shape.dim] == [3, 6]
    assert check_onnx(path, model, x) <= 1e-4


def test_another_operator_set_is_written_or_refused(tmp_path: Path) -> None:
    model, x = nn.Linear(6, 4), torch.randn(3, 6)
    path = export_onnx(model, x, tmp_path / "layer.onnx", opset=20)
    assert [entry.version for entry in onnx.load(path).opset_import if not entry.domain] == [20]
    assert check_onnx(path, model, x) <= 1e-4
    with pytest.raises(ValueError, match=r"opset must be one that the exporter can convert to, got 99"):
        export_onnx(model, x, tmp_path / "none.onnx", opset=99)
    assert not (tmp_path / "none.onnx").exists()


def test_a_difference_is_found(tmp_path: Path) -> None:
    model, x = nn.Linear(6, 4), torch.randn(3, 6)
    path = export_onnx(model, x, tmp_path / "layer.onnx")
    with torch.no_grad():
        model.bias[2] += 0.01
        alone = 0.01 / float(model(x[:1]).abs().max())
    with pytest.raises(ValueError, match=r"must be at most 0.0001, got .* with a batch of 3"):
        check_onnx(path, model, x)
    assert check_onnx(path, model, x[:1], tolerance=1.0) == pytest.approx(alone, rel=1e-3)
    with torch.no_grad():
        model.bias[2] = float("nan")
    with pytest.raises(ValueError, match="got nan"):
        check_onnx(path, model, x)


def test_another_model_is_refused(tmp_path: Path) -> None:
    x = torch.randn(3, 6)
    path = export_onnx(nn.Linear(6, 4), x, tmp_path / "layer.onnx")
    with pytest.raises(ValueError, match=r"output of the file must be of shape \(3, 5\)"):
        check_onnx(path, nn.Linear(6, 5), x)
    with pytest.raises(ValueError, match="outputs of the file must be 2 tensors, got 1"):
        check_onnx(path, Twice(), x)
    with pytest.raises(ValueError, match=r"sample must be 1 inputs \(input\), got 2 tensors"):
        check_onnx(path, Masked(), (x, x))
    with pytest.raises(FileNotFoundError, match="existing file"):
        check_onnx(tmp_path / "none.onnx", nn.Linear(6, 4), x)


class Picking(nn.Module):
    """Indexes with integers of 32 bits, which ONNX's GatherND does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor([2, 0, 2], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.index]


def test_narrow_indices_are_widened(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    path = export_onnx(Picking(), x, tmp_path / "picking.onnx")
    assert "GatherND" in {node.op_type for node in onnx.load(path).graph.node}
    assert check_onnx(path, Picking(), x) == 0


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    model, x = nn.Linear(6, 4), torch.randn(3, 6)
    path = export_onnx(model, x, tmp_path / "layer.onnx")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="must be an ONNX file that onnxruntime takes"):
        check_onnx(path, model, x)


class Twice(nn.Module):
    """Returns two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Flattened(nn.Module):
    """Turns the batch size into a number, as len() does."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x) * 3)


@pytest.mark.parametrize("export", [export_onnx, export_torch])
def test_a_network_with_a_fixed_batch_size_is_refused_and_nothing_written(tmp_path: Path, export) -> None:
    with pytest.raises(ValueError, match="turns the batch size into a constant; pass dynamic_batch=False"):
        export(Flattened(), torch.randn(2, 3), tmp_path / "file")
    assert not list(tmp_path.iterdir())
    assert export(Flattened(), torch.randn(2, 3), tmp_path / "file", dynamic_batch=False).exists()


def test_a_wrong_sample_fails_in_the_models_own_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x must be of shape \(\*batch, 48\), got \(2, 47\)"):
        export_onnx(layer_of(LowRank(rank=4)), torch.randn(2, 47), tmp_path / "layer.onnx")


def test_the_exporter_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_onnx(convolutional(), images(2), tmp_path / "small.onnx")
        export_torch(convolutional(), images(2), tmp_path / "small.pt2")
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert [warning for warning in caught if "onnx" in str(warning.filename)] == []


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ImportError, match=rf"package {missing} must be installed .* pip install 'weft\[onnx\]'"
    ):
        export_onnx(nn.Linear(6, 4), torch.randn(2, 6), tmp_path / "layer.onnx")


def test_a_missing_runtime_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export_onnx(nn.Linear(6, 4), torch.randn(2, 6), tmp_path / "layer.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ImportError, match=r"package onnxruntime must be installed .* pip install 'weft\[onnx\]'"
    ):
        check_onnx(path, nn.Linear(6, 4), torch.randn(2, 6))
