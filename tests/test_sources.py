"""Model and data sources: what they give, and one clear line for every fault."""

import gzip
import os
import re
import struct
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from weft.sources import Data, load_data, load_model, load_weights, read_tensors
from weft.sources.reference import optional_package, parse
from weft.sources.splits import Scaling, TensorSplit, as_split, held_out_indices

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "experiments"
SHARED = Path(os.environ.get("WEFT_DATA") or ROOT.parent / "shared" / "data")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no evaluation data at {SHARED}")

ONE_LINE = re.compile(r"^[^\n]+ must be [^\n]+, got [^\n]+; [^\n]+$")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture
def make_small(tmp_path: Path) -> str:
    """A model source: a tiny network with a batch norm and a tied weight."""
    text = """
        from torch import nn

        class Small(nn.Module):
            def __init__(self):
                super().__init__()
                self.encode = nn.Linear(3, 3)
                self.norm = nn.BatchNorm1d(3)
                self.decode = nn.Linear(3, 3, bias=False)
                self.decode.weight = self.encode.weight

            def forward(self, x):
                return self.decode(self.norm(self.encode(x)))

        def make():
            return Small()
    """
    return f"{write(tmp_path / 'small.py', text)}:make"


# Models


def test_a_function_in_a_file_is_built_in_evaluation_mode(make_small):
    model = load_model(make_small)
    assert not model.training
    assert model(torch.ones(2, 3)).shape == (2, 3)


def test_a_source_file_imports_its_neighbours_and_never_another_folder_s(tmp_path):
    for folder, width in (("a", 5), ("b", 7)):
        write(tmp_path / folder / "width.py", f"WIDTH = {width}\n")
        text = "from torch import nn\nfrom width import WIDTH\ndef make():\n    return nn.Linear(WIDTH, 1)\n"
        write(tmp_path / folder / "net.py", text)
    path = list(sys.path)
    sizes = [load_model(f"{tmp_path}/{folder}/net.py:make").in_features for folder in "aba"]
    assert sizes == [5, 7, 5]
    assert sys.path == path


def test_an_error_inside_the_user_s_code_passes_with_a_note(tmp_path):
    source = f"{write(tmp_path / 'net.py', 'def make(): return 1 // 0')}:make"
    with pytest.raises(ZeroDivisionError) as caught:
        load_model(source)
    assert caught.value.__notes__ == [f"while loading {source}"]


WRITERS: dict[str, Callable[[dict[str, torch.Tensor], Path], object]] = {
    ".safetensors": lambda state, path: save_file({k: v.clone() for k, v in state.items()}, path),
    ".npz": lambda state, path: np.savez(path, **{k: v.numpy() for k, v in state.items()}),
    ".pt": torch.save,
    ".pth": lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    ".ckpt": lambda state, path: torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, path),
    ".bin": lambda state, path: torch.save({f"_orig_mod.{k}": v for k, v in state.items()}, path),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_weights_load_from_every_kind_of_file(make_small, tmp_path, suffix):
    torch.manual_seed(1)
    state = {name: torch.randn(tensor.shape) for name, tensor in load_model(make_small).state_dict().items()}
    state["decode.weight"] = state["encode.weight"]
    del state["norm.num_batches_tracked"]  # older files lack it
    WRITERS[suffix](state, tmp_path / f"weights{suffix}")
    loaded = load_model(make_small, tmp_path / f"weights{suffix}")
    assert loaded.decode.weight is loaded.encode.weight
    for name, tensor in state.items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_one_name_of_a_tied_tensor_is_enough(make_small, tmp_path):
    state = load_model(make_small).state_dict()
    del state["decode.weight"]
    save_file(state, tmp_path / "weights.safetensors")
    loaded = load_model(make_small, tmp_path / "weights.safetensors")
    assert torch.equal(loaded.decode.weight, state["encode.weight"])


def test_half_precision_weights_become_the_network_s_own_type(tmp_path):
    save_file({"weight": torch.eye(2).half(), "bias": torch.ones(2).half()}, tmp_path / "half.safetensors")
    model = nn.Linear(2, 2)
    load_weights(model, tmp_path / "half.safetensors")
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight, torch.eye(2))


WRONG_STATES = {
    "missing": ({"weight": torch.ones(2, 3)}, r"1 missing \(bias\)"),
    "surplus": (
        {"weight": torch.ones(2, 3), "bias": torch.ones(2), "extra": torch.ones(1)},
        r"1 surplus \(extra\)",
    ),
    "shape": ({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, r"weight \(3, 2\) for \(2, 3\)"),
    "type": ({"weight": torch.ones(2, 3, dtype=torch.int8), "bias": torch.ones(2)}, r"weight torch.int8"),
}


@pytest.mark.parametrize("fault", WRONG_STATES)
def test_weights_that_do_not_fit_are_refused_by_name_and_change_nothing(tmp_path, fault):
    state, words = WRONG_STATES[fault]
    save_file(state, tmp_path / "wrong.safetensors")
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(ValueError, match=words) as caught:
        load_weights(model, tmp_path / "wrong.safetensors")
    assert ONE_LINE.match(str(caught.value))
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("kept", [0, 0.5, 0.98])
def test_a_truncated_weights_file_is_refused(tmp_path, suffix, kept):
    path = tmp_path / f"weights{suffix}"
    WRITERS[suffix]({"weight": torch.randn(40, 40), "bias": torch.randn(40)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=f"weights{suffix}") as caught:
        read_tensors(path)
    assert ONE_LINE.match(str(caught.value))


class Surprise:
    pass


def test_pickled_objects_are_never_executed(tmp_path):
    torch.save({"weight": Surprise()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="pickled objects"):
        read_tensors(tmp_path / "model.pt")
    np.savez(tmp_path / "model.npz", weight=np.array([Surprise()], dtype=object))
    with pytest.raises(ValueError, match="pickled objects"):
        read_tensors(tmp_path / "model.npz")


def test_a_checkpoint_with_more_than_tensors_is_refused_by_name(tmp_path):
    torch.save({"weight": torch.ones(1), "epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="epoch"):
        read_tensors(tmp_path / "model.pt")


FILE = """
    import torch
    from torch import nn
    number = 3
    def no_module(): return 3
    def the_class(): return nn.Linear
    def not_finite():
        layer = nn.Linear(2, 2)
        nn.init.constant_(layer.weight, float("nan"))
        return layer
"""
MODEL_FAULTS = [
    ("resnet18", ValueError, "torchvision:"),
    ("torchvison:resnet18", ValueError, "path/to/file.py:function"),
    ("FILE", ValueError, "file.py:function"),
    ("FILE:absent", ValueError, "no_module, not_finite, the_class"),
    ("FILE:number", ValueError, "cannot be called"),
    ("FILE:no_module", TypeError, "got int"),
    ("FILE:the_class", TypeError, "its class"),
    ("FILE:not_finite", ValueError, "parameter weight"),
    ("FOLDER/absent.py:make", FileNotFoundError, "absent.py"),
]


@pytest.mark.parametrize(("source", "kind", "words"), MODEL_FAULTS, ids=[fault[0] for fault in MODEL_FAULTS])
def test_a_faulty_model_source_is_one_clear_line(tmp_path, source, kind, words):
    source = source.replace("FILE", str(write(tmp_path / "net.py", FILE))).replace("FOLDER", str(tmp_path))
    with pytest.raises(kind, match=re.escape(words)) as caught:
        load_model(source)
    assert ONE_LINE.match(str(caught.value))


@pytest.mark.parametrize(
    ("name", "words"), [("absent.npz", "no file at"), ("weights.txt", ".safetensors, .npz")]
)
def test_a_weights_file_must_exist_and_be_of_a_known_kind(make_small, tmp_path, name, words):
    write(tmp_path / "weights.txt", "x")
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(words)):
        load_model(make_small, tmp_path / name)


# Optional packages


@pytest.mark.parametrize(
    ("load", "package", "extra"),
    [
        (lambda: load_model("torchvision:resnet18"), "torchvision", "vision"),
        (lambda: load_model("timm:resnet18"), "timm", "vision"),
        (lambda: load_model("hf:bert-base-uncased"), "transformers", "text"),
        (lambda: load_data("hf:glue"), "datasets", "text"),
        (lambda: load_data("imagefolder:photos"), "PIL.Image", "vision"),
    ],
    ids=["torchvision", "timm", "transformers", "datasets", "Pillow"],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, load, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=re.escape(f"pip install 'weft[{extra}]'")) as caught:
        load()
    assert ONE_LINE.match(str(caught.value))


def test_a_package_built_for_another_torch_says_so(monkeypatch, tmp_path):
    write(tmp_path / "built_elsewhere.py", 'raise RuntimeError("operator built::nms does not exist")')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=re.escape(f"fits torch {torch.__version__}")):
        optional_package("built_elsewhere", "vision")


@pytest.fixture(scope="module")
def torchvision_operators():
    """Declares the operators without which torchvision does not import beside a torch without CUDA."""
    library = torch.library.Library("torchvision", "DEF")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    pytest.importorskip("torchvision")
    yield
    library._destroy()


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_random_networks_are_built_by_name_and_always_the_same(torchvision_operators, package):
    pytest.importorskip(package)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again = (load_model(f"{package}:resnet18?random&num_classes=7") for _ in range(2))
    other = load_model(f"{package}:resnet18?random=1&num_classes=7")
    assert torch.equal(torch.rand(1), expected)  # torch's own generator was left alone
    assert first.fc.out_features == 7
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    with pytest.raises(ValueError, match="did you mean resnet18"):
        load_model(f"{package}:resnet19")


def test_pretrained_weights_out_of_reach_are_said_with_the_remedy(
    torchvision_operators, monkeypatch, tmp_path
):
    def unreachable(*arguments, **options):
        raise urllib.error.URLError("no network here")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(ConnectionError, match="no network here.*--weights FILE.*resnet18[?]random"):
        load_model("torchvision:resnet18")


def test_weights_from_a_file_need_no_download(torchvision_operators, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "urlopen", lambda *arguments, **options: pytest.fail("downloaded"))
    expected = load_model("torchvision:squeezenet1_1?random=3")
    save_file(expected.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_model("torchvision:squeezenet1_1", tmp_path / "weights.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))


def test_a_transformers_folder_gives_the_class_its_weights_were_saved_from(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    saved = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=30, num_labels=3, **sizes)
    )
    saved.save_pretrained(tmp_path)
    loaded = load_model(f"hf:{tmp_path}")
    assert type(loaded) is type(saved)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in saved.state_dict().items())
    assert load_model(f"hf:{tmp_path}?random&num_labels=5").classifier.out_features == 5


# Batches


@pytest.fixture
def numbered() -> TensorSplit:
    """Inputs 0 ... 99, each its own label."""
    return TensorSplit(torch.arange(100.0).unsqueeze(1), torch.arange(100))


def seen(batches) -> list[int]:
    return [int(target) for _, targets in batches for target in targets]


def test_batches_are_complete_in_order_and_iterate_again(numbered):
    batches = numbered.batches(32)
    assert [len(inputs) for inputs, _ in batches] == [32, 32, 32, 4]
    assert len(batches) == 4
    assert seen(batches) == seen(batches) == list(range(100))


def test_shuffled_passes_differ_are_complete_and_can_be_resumed(numbered):
    batches = numbered.batches(32, shuffle=True, seed=3)
    first, second = seen(batches), seen(batches)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(100))
    resumed = numbered.batches(32, shuffle=True, seed=3)
    resumed.resume_at(1)
    assert seen(resumed) == second


@given(st.integers(1, 120), st.integers(1, 120), st.integers(0, 5))
def test_a_smaller_limit_draws_a_part_of_a_larger_one(low, high, seed):
    split = TensorSplit(torch.zeros(100, 1), torch.arange(100))
    low, high = sorted((low, high))
    few, many = (seen(split.batches(7, limit=limit, seed=seed)) for limit in (low, high))
    assert few == many[:low]
    assert len(set(many)) == len(many) == min(high, 100)


def test_a_limited_shuffle_shows_the_same_examples_in_every_pass(numbered):
    batches = numbered.batches(4, limit=10, shuffle=True)
    first, second = seen(batches), seen(batches)
    assert first != second
    assert set(first) == set(second) == set(seen(numbered.batches(limit=10)))


@given(st.integers(0, 200), st.floats(0, 1), st.integers(1, 5), st.booleans())
def test_holding_out_divides_every_class_alike(count, share, classes, labelled):
    labels = torch.arange(count) % classes
    train, test = held_out_indices(count, labels if labelled else None, share)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(count))
    assert abs(len(test) - share * count) <= 1
    if labelled:
        for label in range(classes):
            held, whole = int((labels[test] == label).sum()), int((labels == label).sum())
            assert abs(held - share * whole) <= 1 + 1e-6


def test_scaling_is_pixel_over_255_minus_mean_over_std():
    pixels = torch.randint(0, 256, (4, 3, 2, 2), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    inputs, _ = TensorSplit(pixels, scaling=Scaling(mean=mean, std=std))[:]
    for channel in range(3):
        expected = (pixels[:, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(inputs[:, channel].double(), expected, rtol=0, atol=1e-6)


def test_calibration_draws_from_the_training_part_and_needs_no_labels():
    data = Data("plain", "plain", as_split(torch.arange(9000.0).unsqueeze(1), "train"), None)
    drawn = torch.cat(list(data.inputs(batch_size=1000))).flatten()
    assert len(drawn.unique()) == len(drawn) == 4096
    assert drawn.mean() == pytest.approx(4500, rel=0.05)  # not the first ones
    assert torch.equal(drawn, torch.cat(list(data.inputs())).flatten())
    assert next(iter(data.batches("calibration", limit=5)))[1] is None


class Squares(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor([float(index)]), index**2


class Words(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"input_ids": torch.arange(4) + index, "labels": index}


class Stream(IterableDataset):
    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return ((torch.tensor([float(index)]), index) for index in range(self.length))


FORMS = {
    "pair of tensors": lambda: (torch.arange(10.0).unsqueeze(1), torch.arange(10) ** 2),
    "pair of arrays": lambda: (np.arange(10.0)[:, None], np.arange(10) ** 2),
    "TensorDataset": lambda: TensorDataset(torch.arange(10.0).unsqueeze(1), torch.arange(10) ** 2),
    "Dataset": Squares,
    "DataLoader": lambda: DataLoader(Squares(), batch_size=3, shuffle=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_batches(form):
    batches = as_split(FORMS[form](), "train").batches(4)
    assert [len(targets) for _, targets in batches] == [4, 4, 2]
    for inputs, targets in batches:
        assert inputs.dtype == torch.float32
        assert torch.equal(inputs.flatten().long() ** 2, targets)


def test_a_dict_example_loses_its_labels_to_the_targets():
    inputs, targets = next(iter(as_split(Words(), "train").batches(5)))
    assert set(inputs) == {"input_ids"}
    assert inputs["input_ids"].shape == (5, 4)
    assert targets.tolist() == [0, 1, 2, 3, 4]


def test_a_stream_has_its_own_order_and_no_length():
    data = Data("stream", "stream", as_split(Stream(10), "train"), as_split(DataLoader(Stream(3)), "test"))
    batches = data.batches(batch_size=4)
    assert seen(batches) == seen(batches) == list(range(10))
    assert seen(data.batches(batch_size=4, limit=5)) == list(range(8))
    assert len(list(data.inputs(batch_size=4))) == 3
    assert data.input_shape == (1,)
    with pytest.raises(TypeError):
        len(data.inputs())
    with pytest.raises(ValueError, match="shuffle"):
        data.batches(shuffle=True)
    with pytest.raises(ValueError, match="at least one example"):
        list(as_split(Stream(0), "empty").batches())


def test_reading_leaves_torch_s_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(as_split(Squares(), "train").batches(shuffle=True))
    list(as_split(Stream(3), "train").batches())
    assert torch.equal(torch.rand(1), expected)


SPLIT_FAULTS = {
    "empty": (lambda: as_split(torch.zeros(0, 3), "train"), "at least one example"),
    "empty Dataset": (
        lambda: as_split(torch.utils.data.Subset(Squares(), []), "train"),
        "at least one example",
    ),
    "NaN": (lambda: as_split(torch.full((2, 2), torch.nan), "train"), "finite everywhere"),
    "complex labels": (lambda: as_split((torch.ones(2, 2), torch.ones(2) * 1j), "train"), "integers"),
    "NaN labels": (lambda: as_split((torch.ones(1, 2), torch.tensor([torch.nan])), "train"), "finite"),
    "negative labels": (lambda: as_split((torch.ones(2, 2), torch.tensor([0, -1])), "train"), "from 0 on"),
    "too few labels": (lambda: as_split((torch.ones(3, 2), torch.tensor([0, 1])), "train"), "each of the 3"),
    "text": (lambda: as_split((torch.ones(1, 2), np.array(["cat"])), "train"), "array of numbers"),
    "three items": (lambda: as_split((torch.ones(1),) * 3, "train"), "a pair"),
    "number": (lambda: as_split(3, "train"), "torch Dataset"),
    "no batches": (lambda: as_split(DataLoader(Squares(), batch_size=None), "train"), "batch_size"),
    "batch size": (lambda: as_split(torch.ones(3, 2), "train").batches(0), "batch_size >= 1"),
    "limit": (lambda: as_split(torch.ones(3, 2), "train").batches(limit=0), "limit >= 1"),
    "part": (lambda: load_data("digits").batches("validation"), "'train', 'test', 'calibration'"),
    "no part": (lambda: Data("x", "x", None, None).batches("test"), "has both"),
}


@pytest.mark.parametrize("fault", SPLIT_FAULTS)
def test_faulty_data_is_one_clear_line(fault):
    load, words = SPLIT_FAULTS[fault]
    with pytest.raises((ValueError, TypeError), match=re.escape(words)) as caught:
        load()
    assert ONE_LINE.match(str(caught.value))


class Poisoned(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.tensor([0.0 if index < 2 else torch.nan]), 0


def test_nan_in_data_that_is_read_late_is_found_when_it_is_read():
    batches = iter(as_split(Poisoned(), "train").batches(2))
    next(batches)
    with pytest.raises(ValueError, match="inputs of train must be finite"):
        next(batches)


# Data sources


def test_digits_are_scaled_stratified_and_always_divided_alike():
    data, again = load_data("digits"), load_data("digits")
    inputs, targets = data.test[:]
    assert torch.equal(inputs, again.test[:][0])
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert data.input_shape == (1, 8, 8)
    assert data.classes == tuple("0123456789")
    assert (inputs.min(), inputs.max()) == (0, 1)
    assert targets.bincount(minlength=10).tolist() == pytest.approx([36] * 10, abs=1.5)
    known = {image.numpy().tobytes() for image in data.train[:][0]}
    # Two of the 1797 images could be equal; were the parts to overlap, all of them would be.
    assert sum(image.numpy().tobytes() in known for image in inputs) < 3


@pytest.fixture
def images() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (20, 28, 28), dtype=np.uint8), np.arange(20, dtype=np.uint8) % 10


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("layout", ["npz", "idx", "gz", "torchvision"])
def test_mnist_reads_every_layout_alike(tmp_path, images, layout):
    x, y = images
    if layout == "npz":
        np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x[:5], y_test=y[:5])
    else:
        folder = tmp_path / ("MNIST/raw" if layout == "torchvision" else "")
        folder.mkdir(parents=True, exist_ok=True)
        for part, count in (("train", 20), ("t10k", 5)):
            for kind, array in (("images-idx3", x), ("labels-idx1", y)):
                name, content = f"{part}-{kind}-ubyte", idx(array[:count])
                if layout == "gz":
                    (folder / f"{name}.gz").write_bytes(gzip.compress(content))
                else:
                    (folder / name).write_bytes(content)
    data = load_data(f"mnist:{tmp_path}")
    inputs, targets = data.train[:]
    assert inputs.shape == (20, 1, 28, 28)
    np.testing.assert_allclose(inputs.squeeze(1), x / 255, atol=1e-7)
    assert targets.tolist() == y.tolist()
    assert len(data.test) == 5


@pytest.mark.parametrize("gzipped", [False, True])
def test_a_truncated_idx_file_is_refused(tmp_path, images, gzipped):
    content = idx(images[0])
    name = "train-images-idx3-ubyte" + (".gz" if gzipped else "")
    (tmp_path / name).write_bytes(gzip.compress(content)[:-9] if gzipped else content[:-1])
    with pytest.raises(ValueError, match="complete idx file") as caught:
        load_data(f"mnist:{tmp_path}")
    assert ONE_LINE.match(str(caught.value))


@pytest.fixture
def cifar() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    return generator.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8), generator.integers(
        0, 10, 12, dtype=np.uint8
    )


def test_cifar10_reads_the_binary_version_and_npz_alike(tmp_path, cifar):
    x, y = cifar
    records = np.concatenate([y[:, None], x.reshape(12, -1)], axis=1)
    inner = tmp_path / "bin" / "cifar-10-batches-bin"
    inner.mkdir(parents=True)
    for number, rows in enumerate((records[:4], records[4:8]), 1):
        rows.tofile(inner / f"data_batch_{number}.bin")
    records[8:].tofile(inner / "test_batch.bin")
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "train_8.npz", x=x[:8], y=y[:8])
    np.savez(tmp_path / "npz" / "test_4.npz", x=x[8:], y=y[8:])
    both = [load_data(f"cifar10:{tmp_path}/{kind}?mean=0,0,0&std=1,1,1") for kind in ("bin", "npz")]
    for data in both:
        np.testing.assert_allclose(data.train[:][0], x[:8] / 255, atol=1e-7)
        assert data.test[:][1].tolist() == y[8:].tolist()
    usual, _ = load_data(f"cifar10:{tmp_path}/npz").train[:]
    expected = (x[:8, 2] / 255 - 0.4465) / 0.2616
    np.testing.assert_allclose(usual[:, 2], expected, atol=1e-5)


def test_cifar10_pickles_are_refused_with_the_remedy(tmp_path):
    write(tmp_path / "cifar-10-batches-py" / "data_batch_1", "a pickle")
    with pytest.raises(ValueError, match="pickles are not read; download the binary version"):
        load_data(f"cifar10:{tmp_path}")


def test_a_truncated_cifar10_file_is_refused(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3072))
    with pytest.raises(ValueError, match="3073"):
        load_data(f"cifar10:{tmp_path}")


def test_npz_with_parts_of_its_own_keeps_them(tmp_path):
    names = np.array(["cat", "dog"])
    x, y = np.arange(8.0).reshape(4, 2), np.array([0, 1, 1, 0])
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x[:1].astype(">f4"), classes=names)
    data = load_data(f"npz:{tmp_path}/own.npz")
    assert data.classes == ("cat", "dog")
    assert torch.equal(data.train[:][0], torch.arange(8.0).reshape(4, 2))
    assert data.test[:][1] is None
    assert torch.equal(data.test[:][0], torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize(
    ("held_out", "sizes"), [("", (8, 2)), ("&held_out=1", (0, 10)), ("&held_out=0", (10, 0))]
)
def test_npz_without_parts_is_divided(tmp_path, held_out, sizes):
    np.savez(tmp_path / "one.npz", f=np.zeros((10, 3), np.float16), label=np.arange(10) % 2)
    data = load_data(f"npz:{tmp_path}/one.npz?x=f&y=label{held_out}")
    assert tuple(0 if part is None else len(part) for part in (data.train, data.test)) == sizes
    assert data.sample_input.dtype == torch.float32


def test_npz_integers_stay_integers_and_bytes_are_scaled(tmp_path):
    np.savez(
        tmp_path / "tokens.npz", x_train=np.arange(6).reshape(3, 2), x_test=np.full((1, 2), 255, np.uint8)
    )
    data = load_data(f"npz:{tmp_path}/tokens.npz")
    assert data.sample_input.dtype == torch.int64
    assert data.test[:][0].tolist() == [[1.0, 1.0]]


def save_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> None:
    pillow = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow.new("RGB", size, colour).save(path)


@pytest.mark.parametrize("layout", ["parts", "plain"])
def test_imagefolder_numbers_the_class_folders_and_normalises(tmp_path, layout):
    inner = {"train": "train/", "val": "val/"} if layout == "parts" else {"all": ""}
    for part in inner.values():
        for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
            for number in range(5):
                save_image(tmp_path / f"{part}{name}" / f"{number}.png", colour)
    data = load_data(f"imagefolder:{tmp_path}?size=16")
    assert data.classes == ("blue", "red")
    assert data.input_shape == (3, 16, 16)
    assert (len(data.train), len(data.test)) == ((10, 10) if layout == "parts" else (8, 2))
    for inputs, targets in data.batches("test"):
        assert sorted(set(targets.tolist())) == [0, 1]
        red = (1 - 0.485) / 0.229
        assert inputs[targets == 1][0, 0].unique().item() == pytest.approx(red, abs=1e-5)
        assert inputs[targets == 0][0, 0].unique().item() == pytest.approx(-0.485 / 0.229, abs=1e-5)


def test_imagefolder_cuts_out_the_centre(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    image = pillow.new("L", (60, 20), 0)
    image.paste(255, (20, 0, 40, 20))  # the central square alone is white
    for name in ("one", "two"):
        (tmp_path / "train" / name).mkdir(parents=True)
        image.save(tmp_path / "train" / name / "image.png")
    data = load_data(f"imagefolder:{tmp_path}?size=20&resize=20&mean=0&std=1")
    assert data.sample_input.unique().tolist() == [1.0]
    assert load_data(f"imagefolder:{tmp_path}").input_shape == (3, 224, 224)
    assert data.test is None


def test_an_unreadable_image_is_named(tmp_path):
    pytest.importorskip("PIL.Image")
    write(tmp_path / "train" / "one" / "broken.png", "no image")
    with pytest.raises(ValueError, match="broken.png"):
        list(load_data(f"imagefolder:{tmp_path}").batches())


def test_hugging_face_text_is_tokenised_and_its_classes_are_named(tmp_path):
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"])
    )
    rows = {"text": ["good film", "bad film indeed", "good"], "label": [1, 0, 1]}
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=part, test=part.select([0])).save_to_disk(tmp_path / "reviews")
    write(tmp_path / "vocabulary", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\nbad\nfilm\n")
    transformers.BertTokenizer(str(tmp_path / "vocabulary")).save_pretrained(tmp_path / "tokenizer")
    source = f"hf:{tmp_path}/reviews"
    with pytest.raises(ValueError, match="tokenizer=MODEL_NAME"):
        load_data(source)
    data = load_data(f"{source}?tokenizer={tmp_path}/tokenizer")
    inputs, targets = data.train[:]
    assert data.classes == ("bad", "good")
    assert targets.tolist() == [1, 0, 1]
    assert inputs["attention_mask"].sum(1).tolist() == [4, 5, 3]
    assert len(data.test) == 1
    with pytest.raises(TypeError, match="sample_input"):
        _ = data.input_shape


def test_hugging_face_images_are_prepared_as_an_image_folder_s(tmp_path):
    datasets, pillow = pytest.importorskip("datasets"), pytest.importorskip("PIL.Image")
    rows = {"image": [pillow.new("RGB", (9, 7), (255, 0, 0)) for _ in range(10)], "label": [0, 1] * 5}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=part).save_to_disk(tmp_path / "images")
    data = load_data(f"hf:{tmp_path}/images?size=4")
    inputs, targets = data.test[:]
    assert (len(data.train), len(data.test)) == (8, 2)
    assert sorted(targets.tolist()) == [0, 1]
    assert inputs.shape == (2, 3, 4, 4)
    assert inputs[0, 0].unique().item() == pytest.approx((1 - 0.485) / 0.229, abs=1e-5)


def test_a_function_gives_a_pair_or_a_data(tmp_path):
    text = """
        import torch
        from weft.sources import Data
        from weft.sources.splits import as_split
        def pair(): return (torch.ones(4, 2), torch.arange(4)), torch.ones(2, 2)
        def data(): return Data("mine", "?", as_split(torch.ones(4, 2), "train"), None, ("a",))
        def number(): return 3
    """
    path = write(tmp_path / "mine.py", text)
    pair, data = (load_data(f"{path}:{name}") for name in ("pair", "data"))
    assert (len(pair.train), len(pair.test), pair.name) == (4, 2, "pair")
    assert (data.name, data.source, data.classes) == ("mine", f"{path}:data", ("a",))
    with pytest.raises(TypeError, match="got int"):
        load_data(f"{path}:number")


DATA_FAULTS = [
    ("cifar100:x", ValueError, "digits"),
    ("digits?size=3", ValueError, "'size'"),
    ("digits?held_out=2", ValueError, "held_out"),
    ("digits?held_out=many", ValueError, "'many'"),
    ("mnist:", FileNotFoundError, "no folder named"),
    ("mnist:FOLDER/absent", FileNotFoundError, "absent"),
    ("mnist:FOLDER", FileNotFoundError, "mnist.npz"),
    ("cifar10:FOLDER", FileNotFoundError, "train*.npz"),
    ("npz:FOLDER/absent.npz", FileNotFoundError, "absent.npz"),
    ("npz:FOLDER/text.npz", ValueError, "text.npz"),
    ("npz:FOLDER/cut.npz", ValueError, "complete npz"),
    ("npz:FOLDER/good.npz", ValueError, "only f in"),
    ("npz:FOLDER/good.npz?x=g", ValueError, "no array g"),
    ("npz:FOLDER/good.npz?x=f&mean=1,2", ValueError, "3 numbers"),
    ("npz:FOLDER/good.npz?x=f&std=0", ValueError, "positive"),
    ("npz:FOLDER/good.npz?x=f&held_out=0.01", ValueError, "divides 10 examples"),
    ("npz:FOLDER/good.npz?x_train=f&held_out=0.5", ValueError, "held_out"),
    ("npz:FOLDER/empty.npz", ValueError, "at least one example"),
    ("npz:FOLDER/nan.npz", ValueError, "finite"),
]


@pytest.mark.parametrize(("source", "kind", "words"), DATA_FAULTS, ids=[fault[0] for fault in DATA_FAULTS])
def test_a_faulty_data_source_is_one_clear_line(tmp_path, source, kind, words):
    write(tmp_path / "text.npz", "no archive")
    np.savez(tmp_path / "good.npz", f=np.ones((10, 3)))
    np.savez(tmp_path / "empty.npz", x=np.ones((0, 3)))
    np.savez(tmp_path / "nan.npz", x=np.full((2, 2), np.nan))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:-30])
    with pytest.raises(kind, match=re.escape(words)) as caught:
        load_data(source.replace("FOLDER", str(tmp_path)))
    assert ONE_LINE.match(str(caught.value))


@given(st.text("npz:?=&./y ", max_size=30))
def test_parsing_keeps_every_part_of_a_known_source(rest):
    reference = parse("data", f"npz:{rest}", ["npz"])
    place, _, options = rest.partition("?")
    assert reference.place == place
    assert set(reference.given_options) == {item.partition("=")[0] for item in options.split("&") if item}


# The experiments' networks and data


def accuracy(model: nn.Module, data: Data, limit: int | None = None) -> float:
    with torch.inference_mode():
        hits = [(model(x).argmax(1) == y).float() for x, y in data.batches("test", limit=limit)]
    return torch.cat(hits).mean().item()


PARAMETERS = {
    "mnist_network": (784 * 128 + 128 * 32 + 32 * 10 + 170, (1, 28, 28)),
    "lenet_300_100": (784 * 300 + 300 * 100 + 100 * 10 + 410, (1, 28, 28)),
    "lenet_5": (431_080, (1, 28, 28)),  # Han et al. 2016: 431K
    "resnet20": (269_722, (3, 32, 32)),  # He et al. 2016, table 6: 0.27M
    "resnet32": (464_154, (3, 32, 32)),  # 0.46M
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_experiments_networks_have_their_papers_sizes(name):
    count, shape = PARAMETERS[name]
    model = load_model(f"{EXPERIMENTS}/models.py:{name}")
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model(torch.zeros(2, *shape)).shape == (2, 10)


@needs_shared
def test_the_mnist_network_reaches_its_accuracy():
    model = load_model(f"{EXPERIMENTS}/models.py:mnist_network", SHARED / "mnist" / "mlp_784_128_32_10.npz")
    data = load_data(f"{EXPERIMENTS}/data.py:mnist")
    assert accuracy(model, data) == pytest.approx(0.9451, abs=1e-4)


@needs_shared
@pytest.mark.parametrize(("name", "expected"), [("resnet20", 0.908), ("resnet32", 0.917)])
def test_the_residual_networks_reach_their_accuracy_on_a_thousand_images(name, expected):
    model = load_model(f"{EXPERIMENTS}/models.py:{name}", SHARED / "cifar10" / f"{name}.npz")
    data = load_data(f"{EXPERIMENTS}/data.py:cifar10")
    # Measured here. Two images' worth of room: other machines round differently at the decision boundary.
    assert accuracy(model, data, limit=1000) == pytest.approx(expected, abs=2e-3)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), [("resnet20", 0.919), ("resnet32", 0.9256)])
def test_the_residual_networks_reach_their_accuracy_on_all_images(name, expected):
    model = load_model(f"{EXPERIMENTS}/models.py:{name}", SHARED / "cifar10" / f"{name}.npz")
    data = load_data(f"{EXPERIMENTS}/data.py:cifar10")
    assert accuracy(model, data) == pytest.approx(expected, abs=6e-4)


@needs_shared
@pytest.mark.parametrize(("name", "calibration"), [("imagenet_features", 1000), ("imagenet_crops", 4096)])
def test_the_imagenet_classifier_reaches_its_accuracy(name, calibration):
    model = load_model(f"{EXPERIMENTS}/models.py:mobilenet_v2_classifier")
    data = load_data(f"{EXPERIMENTS}/data.py:{name}")
    assert accuracy(model, data) == pytest.approx(0.7985, abs=1e-3)
    assert sum(len(inputs) for inputs in data.inputs()) == calibration


def test_absent_evaluation_data_names_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("WEFT_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}/elsewhere; set WEFT_DATA")):
        load_data(f"{EXPERIMENTS}/data.py:cifar10")
