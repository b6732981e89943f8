"""The command line as a user meets it: every verb on real input, and one clear line for what he can mend."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from weft import compress, load, save
from weft.cli import app, main
from weft.plan.plan import Plan
from weft.sources import load_data, load_model
from weft.structures.low_rank import LowRank
from weft.survey import Survey, survey

MODELS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )

def other():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def with_nan():
    model = network()
    model[4].weight.data[0, 0] = float("nan")
    return model

def without_layers():
    return nn.Sequential(nn.Flatten(), nn.ReLU())

def wrong_shape():
    return torch.zeros(10, 3, 8, 8), torch.zeros(4, 3, 8, 8)

def labelled_wrong():
    pairs = TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))
    return pairs, pairs

def vectors():
    pairs = TensorDataset(torch.zeros(4, 64), torch.zeros(4, dtype=torch.int64))
    return pairs, pairs

def unlabelled():
    return torch.zeros(10, 1, 8, 8), torch.zeros(4, 1, 8, 8)

def empty():
    return torch.zeros(0, 1, 8, 8), torch.zeros(0, 1, 8, 8)

def regression():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

def depthwise():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.Conv2d(32, 32, 5, groups=32), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    )

def measured():
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    y = regression()(x).detach().squeeze(1)
    return (x[:200], y[:200]), (x[200:], y[200:])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))  # not the user's own
    return tmp_path


def weft(monkeypatch: pytest.MonkeyPatch, command: str) -> int:
    """Runs one command as the shell would and gives its exit status."""
    monkeypatch.setattr("sys.argv", ["weft", *command.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def test_each_verb_reads_the_file_that_the_one_before_wrote(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weft(monkeypatch, "survey models.py:network --data digits --samples 200 -o survey.json") == 0
    assert weft(monkeypatch, "plan survey.json --budget parameters=0.3 --families LowRank -o plan.json") == 0
    assert weft(monkeypatch, "compress plan.json --data digits --samples 200 -o small.safetensors") == 0
    assert weft(monkeypatch, "finetune small.safetensors --data digits -o tuned.safetensors") == 0
    assert weft(monkeypatch, "evaluate tuned.safetensors --data digits --batches 1 -o run.json") == 0
    assert weft(monkeypatch, "report run.json --plan plan.json -o report.html") == 0
    assert weft(monkeypatch, "picture tuned.safetensors 4 -o picture.svg") == 0
    assert (
        weft(monkeypatch, "bench tuned.safetensors --data digits --batches 1 --seconds 0.05 -o bench.json")
        == 0
    )
    assert weft(monkeypatch, "plan survey.json --budget peak_memory=0.8 --data digits -o memory.json") == 0
    assert json.loads((folder / "memory.json").read_text())["peak_memory"] > 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown
    assert "bytes in memory" in shown
    measured = json.loads((folder / "run.json").read_text())["measurement"]
    dense, cost = measured["dense_cost"], measured["cost"]
    assert 0.2 < cost["parameters"] / dense["parameters"] <= 0.3
    assert cost["multiply_adds"] < dense["multiply_adds"]
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "What each family can reach" in page
    assert "at most 30 % of the parameters, from LowRank; 1 epoch of fine-tuning" in page
    made_by = json.loads((folder / "run.json").read_text())["command"].splitlines()
    assert [line.split()[:2] for line in made_by] == [
        ["weft", verb] for verb in ("survey", "plan", "compress", "finetune", "evaluate")
    ]
    assert made_by[0] == "weft survey models.py:network --data digits --samples 200 -o survey.json"
    assert made_by[4] in page
    assert weft(monkeypatch, "report run.json run.json -o both.html") == 0
    assert "To repeat them" in (folder / "both.html").read_text()
    assert weft(monkeypatch, "report run.json run.json --plan plan.json") == 2
    assert "--plan must be left out with several runs" in capsys.readouterr().err
    assert "<svg" in (folder / "picture.svg").read_text()
    assert json.loads((folder / "bench.json").read_text())["rows"][0]["dense"]["median"] > 0


def test_one_command_walks_the_whole_path_and_the_file_alone_rebuilds_the_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "compress models.py:network --data digits --samples 200 --budget bytes=0.3 --families LowRank"
    assert weft(monkeypatch, f"{command} --epochs 1 --save-plan plan.json -o small.safetensors") == 0
    assert Plan.load("plan.json").pareto is not None
    small = load(folder / "small.safetensors")
    assert small(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert sum(parameter.numel() for parameter in small.parameters()) < 0.3 * 34_000
    assert not small.training


def test_sizes_are_learned_at_a_price(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "compress models.py:network --data digits --samples 200 --scheme lc --steps 3 --keep-dense 6"
    command += " --metric outputs"
    assert weft(monkeypatch, f"{command} --price parameters=1e-4 --checkpoint run -o small.safetensors") == 0
    small = load(folder / "small.safetensors")
    shown = capsys.readouterr().out
    assert "LowRank" in shown
    assert re.search(r"at the end weights and structures were \d+\.\d% apart", shown)
    assert isinstance(small[6], torch.nn.Linear)
    assert not small.training
    entries = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["lc_step"] for entry in entries if "distance" in entry] == [0, 1, 2]
    assert entries[-1]["mu"] == pytest.approx(1e-3 * 1.3**2)
    assert weft(monkeypatch, f"{command} --price parameters=1e-4 --checkpoint run -o again.safetensors") == 0
    again = load(folder / "again.safetensors").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in small.state_dict().items())


def test_weights_come_near_to_the_structures_of_a_plan(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        "compress models.py:network --data digits --samples 200 --scheme lc --steps 3 --budget bytes=0.3"
    )
    assert weft(monkeypatch, f"{command} --checkpoint run -o small.safetensors") == 0
    found = re.search(r"at the end weights and structures were (.*)% apart", capsys.readouterr().out)
    assert found is not None
    entries = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "distance" in entry]
    assert [entry["mu"] for entry in steps] == pytest.approx([0.01, 0.01 * 1000**0.5, 10.0])
    assert float(found[1]) == pytest.approx(100 * steps[-1]["distance"], abs=0.06)
    assert steps[-1]["distance"] < 0.75 * steps[0]["distance"]


def test_a_network_shrinks_in_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"4": {"structure": {"family": "Pruned", "density": 0.05}}}
    assert weft(monkeypatch, "survey models.py:network --data digits --samples 200 -o survey.json") == 0
    assert weft(monkeypatch, "plan survey.json --budget parameters=0.3 -o plan.json") == 0
    record = {**json.loads((folder / "plan.json").read_text()), "layers": plan}
    (folder / "plan.json").write_text(json.dumps(record))
    command = "compress plan.json --data digits --scheme iterative --steps 2 -o small.safetensors"
    assert weft(monkeypatch, command) == 0
    small = load(folder / "small.safetensors")
    assert int((small[4].matrix.to_dense() != 0).sum()) == round(0.05 * 512 * 64)


def test_a_file_can_be_entropy_coded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("constriction")
    command = "compress models.py:network --data digits --samples 200 --budget bytes=0.3 --families LowRank"
    assert weft(monkeypatch, f"{command} -o plain.safetensors") == 0
    assert weft(monkeypatch, f"{command} --entropy-coding -o coded.safetensors") == 0
    plain, coded = load(folder / "plain.safetensors"), load(folder / "coded.safetensors")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, coded.state_dict()[name])
    assert (folder / "coded.safetensors").stat().st_size < (folder / "plain.safetensors").stat().st_size


def test_planning_takes_constraints_sensitivity_and_kept_curves(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weft(monkeypatch, "survey models.py:network --data digits --samples 200 -o survey.json") == 0
    command = "plan survey.json --families LowRank,SparseProduct --workers 1 --cache kept --data digits"
    options = "--budget bytes=0.5 --keep-dense 6 --only 4=LowRank --sensitivity squared --samples 100"
    assert weft(monkeypatch, f"{command} {options} -o plan.json") == 0
    shown = capsys.readouterr().out
    assert "rank correlation of predicted and measured" in shown
    layers = json.loads((folder / "plan.json").read_text())["layers"]
    assert layers["6"]["structure"] == {"family": "Dense"}
    assert layers["4"]["structure"]["family"] == "LowRank"
    assert list((folder / "kept" / "curves").iterdir())
    assert weft(monkeypatch, f"{command} --budget latency=1.0 --latency-batch 4 -o timed.json") == 0
    timed = json.loads((folder / "timed.json").read_text())
    assert timed["budget"] == {"latency": 1.0}
    assert timed["seconds"] > 0
    assert list((folder / "kept" / "latencies").iterdir())


def test_what_is_not_a_terminal_gets_tables_at_their_own_width(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert weft(monkeypatch, "survey models.py:network --data digits --samples 200 -o survey.json") == 0
    capsys.readouterr()
    command = "plan survey.json --budget bytes=0.4,multiply_adds=0.9 --families LowRank,Pruned,Quantized"
    assert weft(monkeypatch, f"{command} --workers 1 -o plan.json") == 0
    shown = capsys.readouterr().out
    plan = Plan.load(folder / "plan.json")
    rows = {line.split("│")[1].strip(): line for line in shown.splitlines() if line.startswith("│")}
    assert list(rows) == list(plan.structures)
    for name, structure in plan.items():
        cells = [cell.strip() for cell in rows[name].split("│")[1:-1]]
        assert cells[1] == str(structure)  # in one piece
        dense = load_model("models.py:network").get_submodule(name).weight
        cost = plan.expected[name].cost
        assert cells[3:5] == [f"{cost.parameters / dense.numel():.1%}", f"{cost.bytes / dense.nbytes:.1%}"]
        if plan.others.get(name):
            (told,) = [line for line in shown.splitlines() if line.startswith(f"  {name}: ")]
            assert all(family in told for family in plan.others[name])


def test_a_plan_edited_by_hand_is_shown_as_it_came_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert weft(monkeypatch, "survey models.py:network -o survey.json") == 0
    assert weft(monkeypatch, "plan survey.json --budget bytes=0.5 --workers 1 -o plan.json") == 0
    plan = json.loads((folder / "plan.json").read_text())
    plan["layers"]["4"] = {"structure": {"family": "LowRank", "rank": 3}}
    plan["layers"]["6"] = {"structure": {"family": "Dense"}}
    (folder / "plan.json").write_text(json.dumps(plan))
    capsys.readouterr()
    assert weft(monkeypatch, "compress plan.json -o small.safetensors") == 0
    shown = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in shown.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["6"]] == ["Dense()", "10x64", "100.0%", "100.0%", "-", "0.0000"]
    small = load(folder / "small.safetensors")
    count = sum(value.numel() for value in small.parameters())
    assert f"the network: parameters {count:,} (" in shown  # not what the plan had before


def test_fisher_weighs_errors_by_what_they_do_to_the_scores(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by labels drawn from them: gradients of a network that is sure of its answers vanish."""
    command = "survey models.py:network --data digits --samples 100 --batch-size 50 --fisher"
    assert weft(monkeypatch, f"{command} -o survey.json") == 0
    model = load_model("models.py:network")
    batches = load_data("digits").inputs("calibration", batch_size=50, limit=100)
    expected = survey(model, batches, loss="squared")
    for name, layer in Survey.load("survey.json", model).layers.items():
        torch.testing.assert_close(layer.output_gram.moment, expected.layers[name].output_gram.moment)


def test_a_survey_times_the_layers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weft(monkeypatch, "survey models.py:network --data digits --samples 100 --times") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "quarter" in shown
    assert "the network: 33,570 parameters" in shown
    assert weft(monkeypatch, "survey models.py:network --times") == 2


def test_a_share_of_the_accuracy_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "compress models.py:network --data digits --samples 200 --workers 1 --cache kept"
    assert weft(monkeypatch, f"{command} --budget keep=0.9 --sequential -o small.safetensors") == 0
    values = re.search(
        r"the search saw: ([\d.]+) of ([\d.]+); on the other half", " ".join(capsys.readouterr().out.split())
    )
    assert values is not None
    assert float(values[1]) >= 0.9 * float(values[2])
    assert load(folder / "small.safetensors")(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_plan_says_where_size_is_paid_for_in_multiply_adds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weft(monkeypatch, "survey models.py:depthwise --data digits --samples 64 -o survey.json") == 0
    assert weft(monkeypatch, "plan survey.json --budget bytes=0.6 -o plan.json") == 0
    assert "more multiply-adds than dense: 1; where time counts too" in capsys.readouterr().out
    assert weft(monkeypatch, "plan survey.json --budget bytes=0.8,multiply_adds=1.0 -o plan.json") == 0
    assert "more multiply-adds than dense" not in capsys.readouterr().out


def test_a_regression_goes_the_whole_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = "--data models.py:measured"
    compressed = f"compress models.py:regression {data} --fisher --budget parameters=0.8"
    assert weft(monkeypatch, f"{compressed} --epochs 1 -o small.safetensors") == 0
    tuned = f"finetune small.safetensors {data} --validation 0.2 --epochs 30 --learning-rate 1e-2"
    assert weft(monkeypatch, f"{tuned} -o tuned.safetensors") == 0
    assert "R² on the 20% held out: 0.9" in capsys.readouterr().out
    assert weft(monkeypatch, f"evaluate tuned.safetensors {data} --batches 1 -o run.json") == 0
    assert json.loads((folder / "run.json").read_text())["measurement"]["metric"] == "R²"
    assert (
        weft(monkeypatch, f"compress models.py:regression {data} --budget keep=0.9 -o kept.safetensors") == 0
    )
    assert "R² on the half of the test data" in capsys.readouterr().out


def test_export_is_checked_in_onnxruntime(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    command = "compress models.py:network --budget bytes=0.3 --families LowRank -o small.safetensors"
    assert weft(monkeypatch, command) == 0
    assert weft(monkeypatch, "export small.safetensors --data digits -o small.onnx") == 0
    assert "onnxruntime differs by" in capsys.readouterr().out
    assert (folder / "small.onnx").stat().st_size > 1000


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            "compress models.py:with_nan --data digits --budget bytes=0.25",
            "must be finite everywhere, got 1 NaN",
        ),
        ("compress models.py:without_layers --budget bytes=0.25", "a layer that can be replaced"),
        ("survey models.py:without_layers --data digits", "a layer that can be replaced"),
        (
            "compress models.py:network --data models.py:wrong_shape --budget bytes=0.5",
            r"got \(10, 3, 8, 8\)",
        ),
        ("compress models.py:network --data models.py:empty --budget bytes=0.5", "at least one example"),
        (
            "compress models.py:network --budget bytes=0.001 --families LowRank",
            r"at least \d+, the smallest possible",
        ),
        (
            "compress models.py:network --budget size=0.1",
            "budget must be one of parameters, bytes, multiply_adds",
        ),
        ("compress models.py:network --budget bytes=1.5", "budget bytes must be a share"),
        ("compress models.py:network", "--budget must be given"),
        ("compress models.py:network --scheme lc --price parameters=0", "price must be above 0"),
        (
            "compress models.py:network --scheme lc --metric inputs",
            "--metric must be one of .weights., .outputs.",
        ),
        (
            "compress models.py:network --price parameters=1",
            "--price must be given with MODEL and",
        ),
        (
            "compress models.py:network --scheme lc --price parameters=1",
            "--data must be given with",
        ),
        (
            "compress models.py:network --scheme best --budget bytes=0.5",
            "--scheme must be one of",
        ),
        (
            "compress models.py:network --scheme lc --price parameters=1 --penalty-factor 0.9 --data digits",
            "factor must be at least 1, got 0.9",
        ),
        ("compress models.py:network --budget multiply_adds=0.5", "survey with batches"),
        ("compress models.py:network --budget bytes=0.5 --families Low", "family must be one of"),
        (
            "compress models.py:network --budget bytes=0.5 -o nowhere/small.safetensors",
            "in an existing folder",
        ),
        ("compress models.py:missing --budget bytes=0.5", "missing"),
        ("compress nowhere.py:network --budget bytes=0.5", "nowhere.py"),
        ("compress models.py:network --weights nowhere.npz --budget bytes=0.5", "nowhere.npz"),
        ("compress models.py:network --data mnist:nowhere --budget bytes=0.5", "nowhere"),
        ("compress zero.json", "layer 4 of zero.json: rank must be at least 1, got 0"),
        ("compress large.json", "layer 4: rank must be between 1 and 64 .* got 5000"),
        ("plan nowhere.json --budget bytes=0.5", "nowhere.json"),
        ("plan zero.json --budget bytes=0.5", '"weft_survey": 1'),
        ("evaluate cut.safetensors --data digits", "a whole safetensors file"),
        ("evaluate nowhere.safetensors --data digits", "nowhere.safetensors"),
        (
            "evaluate small.safetensors --data digits --model models.py:other",
            "layer 4 .* a layer of the model",
        ),
        ("evaluate small.safetensors --data digits --batches one", "whole numbers separated by commas"),
        ("export small.safetensors --data digits -o small.txt", "a .onnx or .pt2 file"),
        ("picture small.safetensors nowhere -o picture.svg", "LAYER must be one of"),
        ("report zero.json", '"weft_run": 1'),
        ("survey models.py:network --data models.py:vectors", r"what the model takes, got \(4, 64\)"),
        ("evaluate small.safetensors --data models.py:labelled_wrong", "data must be what the model takes"),
        ("evaluate small.safetensors --data models.py:unlabelled", "pairs, got no labels"),
        ("export small.safetensors --data models.py:labelled_wrong -o small.onnx", "what the model takes"),
        ("export small.safetensors --data models.py:labelled_wrong -o small.pt2", "what the model takes"),
        ("bench small.safetensors --data models.py:labelled_wrong", "what the model takes"),
        ("compress models.py:network --budget bytes=0.5 --epochs 2", "--data must be given with --epochs"),
        ("compress models.py:network --budget keep=1.5 --data digits", "budget keep must be a share"),
        ("compress models.py:network --budget bytes=0.5 --families lowrank", "write LowRank"),
        ("bench small.safetensors --data digits --dtype bfloat16", "--dtype must be given for --layer only"),
        ("bench --layer 8x8 --families LowRank --dtype half", "--dtype must be one of 'float32', 'bfloat16'"),
        ("survey models.py:network -o nowhere/survey.json", "in an existing folder"),
        ("plan survey.json --budget bytes=0.5 -o nowhere/plan.json", "in an existing folder"),
        ("plan survey.json --budget bytes=0.5 -o .", "--output must be a file"),
        ("compress models.py:network --budget bytes=0.5 -o .", "--output must be a file"),
        ("picture small.safetensors 4 -o nowhere/picture.svg", "in an existing folder"),
    ],
)
def test_bad_input_is_one_clear_line_status_2_and_nothing_written(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    expected: str,
) -> None:
    assert weft(monkeypatch, "survey models.py:network -o survey.json") == 0
    for name, rank in (("zero", 0), ("large", 5000)):
        plan = {
            "weft_plan": 1,
            "source": "models.py:network",
            "weights": "",
            "survey": "survey.json",
            "layers": {"4": {"structure": {"family": "LowRank", "rank": rank}}},
        }
        (folder / f"{name}.json").write_text(json.dumps(plan))
    weft(monkeypatch, "compress models.py:network --budget bytes=0.5 --families LowRank -o small.safetensors")
    whole = (folder / "small.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    capsys.readouterr()

    output = "" if " -o " in command or command.startswith("survey") else " -o out.file"
    assert weft(monkeypatch, command + output) == 2
    error = capsys.readouterr().err
    assert re.search(expected, error), error
    assert error.startswith("weft: ")
    assert len(error.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        (
            "def make():\n    return {}['width']",
            ["line 2, in make", "KeyError: 'width'", "while loading own.py"],
        ),
        (
            "import torch\ndef make():\n    raise RuntimeError('no weights')",
            ["line 3, in make", "no weights"],
        ),
        ("def make():\n    raise ValueError('no width')", [r"^weft: no width \(.*own.py, line 2\)\n$"]),
        ("import nowhere", [r"^weft: No module named 'nowhere' \(.*own.py, line 1\)\n$"]),
        ("def make(:", ["own.py", "SyntaxError"]),
    ],
)
def test_an_error_in_a_users_file_is_shown_where_it_is(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    lines: list[str],
) -> None:
    (folder / "own.py").write_text(source + "\n")
    assert weft(monkeypatch, "survey own.py:make") == 2
    error = capsys.readouterr().err
    for line in lines:
        assert re.search(line, error), error
    assert "typer" not in error
    assert "cli.py" not in error


def test_every_verb_has_help_with_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verbs = [command.name for command in app.registered_commands]
    assert {"survey", "plan", "compress", "evaluate", "bench", "report", "demo", "export"} <= set(verbs)
    for verb in verbs:
        assert weft(monkeypatch, f"{verb} --help") == 0
        lines = capsys.readouterr().out.split("Example", 1)[1].splitlines()[1:]
        assert any(line.strip().startswith(f"weft {verb}") for line in lines), verb
        assert all(line.strip().startswith(("weft", "torchrun")) for line in lines), verb  # none is folded


def test_families_lists_the_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weft(monkeypatch, "families") == 0
    assert "LowRank" in capsys.readouterr().out


def test_finetune_takes_every_option_and_goes_on_where_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "compress models.py:network --data digits --budget bytes=0.3 --samples 128 -o small.safetensors"
    assert weft(monkeypatch, command) == 0
    options = (
        "finetune small.safetensors --data digits --epochs 2 --learning-rate 1e-2,1e-4 --optimiser rmsprop "
        "--schedule linear --weight-decay 1e-4 --label-share 0.5 --temperature 3 --features 3 "
        "--validation 0.2 --patience 2 --augment shift=1,rotation=5 --batch-size 128 --accumulate 2 "
        "--clip 1 --amp --batch-norm --seed 3 --log run.jsonl --checkpoint run --checkpoint-seconds 0 "
        "-o tuned.safetensors"
    )
    assert weft(monkeypatch, options) == 0
    assert "accuracy on the 20% held out: " in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(10))
    assert len([line for line in lines if "metric" in line]) == 2
    first = load("tuned.safetensors").state_dict()
    assert weft(monkeypatch, options) == 0  # it was finished: nothing is trained again
    assert len(Path("run.jsonl").read_text().splitlines()) == len(lines)
    again = load("tuned.safetensors").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    capsys.readouterr()
    assert weft(monkeypatch, options.replace("--seed 3", "--seed 4")) == 2
    assert "seed 3 there, 4 here" in capsys.readouterr().err
    assert weft(monkeypatch, "evaluate tuned.safetensors --data digits --batches 1 -o eval.json") == 0
    assert weft(monkeypatch, "report eval.json --log run.jsonl -o page.html") == 0
    assert "10 steps: " in Path("page.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--learning-rate fast", "--learning-rate must be numbers above 0, separated by commas, got 'fast'"),
        ("--optimiser magic", "optimiser must be one of 'adamw', 'adam', 'rmsprop', 'sgd', got 'magic'"),
        ("--schedule none", "schedule must be one of 'cosine', 'linear', 'constant', got 'none'"),
        ("--patience 2", "validation must be given with patience, got None"),
        ("--learning-rate 1e-3,1e-4", "validation must be given with rates, got None"),
        ("--validation 1.5", "--validation must be a share above 0 and at most 1, got 1.5"),
        ("--augment zoom=2", "augment must be such as shift=2,rotation=10,flip, got 'zoom=2'"),
        ("--features nothing", "features must be a module of the student, got 'nothing'"),
        ("--labels --batch-norm", "teacher must be given with batch_norm, got None"),
        ("--log none/run.jsonl", "log must be in an existing folder, got none/run.jsonl"),
    ],
)
def test_finetune_refuses_what_makes_no_sense(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    network, _ = compress(load_model("models.py:network"), {"4": LowRank(2)})
    save(network, "small.safetensors", source="models.py:network")
    assert weft(monkeypatch, f"finetune small.safetensors --data digits {options}") == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_in_shards_goes_the_whole_way_without_a_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(512, 64), nn.Linear(64, 10))
    (folder / "dense").mkdir()
    save_file(model.state_dict(), folder / "dense" / "model.safetensors")
    assert weft(monkeypatch, "survey --shards dense") == 0
    assert "3 weights can be replaced" in capsys.readouterr().out
    assert weft(monkeypatch, "plan survey.json --budget bytes=0.3 --workers 1") == 0
    assert weft(monkeypatch, "compress plan.json -o two") == 0
    assert weft(monkeypatch, "plan --shards dense --budget bytes=0.3 --workers 1 -o other.json") == 0
    assert weft(monkeypatch, "compress --shards dense --budget bytes=0.3 --workers 1 -o one") == 0
    assert "wrote one" in capsys.readouterr().out
    found = [load(folder / name, model=model).state_dict() for name in ("one", "two")]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert sum(tensor.nbytes for tensor in found[0].values()) <= 0.3 * sum(
        tensor.nbytes for tensor in model.state_dict().values()
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("survey", "MODEL or --shards must be one of the two, got neither"),
        ("survey models.py:network --shards dense", "MODEL or --shards must be one of the two, got both"),
        ("plan --budget bytes=0.5", "SURVEY or --shards must be one of the two, got neither"),
        ("compress", "MODEL or --shards must be one of the two, got neither"),
        ("survey --shards dense --data digits", "--data must be left out with --shards, got digits"),
        ("compress --shards dense --budget bytes=0.5 --epochs 2", "--epochs must be left out with --shards"),
        ("compress --shards dense", "--budget must be given with a model, got none"),
        ("survey --shards nowhere", "shards must be an existing folder"),
    ],
)
def test_what_shards_cannot_be_combined_with_is_said(
    command: str,
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "dense").mkdir()
    save_file({"0.weight": torch.ones(4, 4)}, folder / "dense" / "model.safetensors")
    assert weft(monkeypatch, command) == 2
    assert message in capsys.readouterr().err


def test_a_plan_says_what_scouting_left_out_and_can_do_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "alike.py").write_text(
        "import torch\n"
        "def network():\n"
        "    torch.manual_seed(0)\n"
        "    layers = [torch.nn.Linear(16, 16, bias=False) for _ in range(5)]\n"
        "    with torch.no_grad():\n"
        "        for layer in layers:\n"
        "            left, _, right = torch.linalg.svd(layer.weight)\n"
        "            layer.weight.copy_(left * 0.6 ** torch.arange(16) @ right)\n"
        "    return torch.nn.Sequential(*layers)\n"
    )
    assert weft(monkeypatch, "survey alike.py:network -o survey.json") == 0
    command = "plan survey.json --budget parameters=0.4 --families LowRank,SparseProduct --workers 1"
    plans = {}
    for option in ("--scout", "--no-scout"):
        capsys.readouterr()
        assert weft(monkeypatch, f"{command} {option} --cache kept -o plan.json") == 0
        shown = capsys.readouterr().out
        plans[option] = json.loads((folder / "plan.json").read_text())
        assert ("left out by scouting" in shown) == (option == "--scout")
        assert bool(plans[option]["scouted"]) == (option == "--scout")
        for found in plans[option]["scouted"]:
            assert f"{found['layers'][0]}, by" in shown or f"like {found['layers'][0]}, by" in shown
    assert plans["--scout"]["layers"].keys() == plans["--no-scout"]["layers"].keys()
