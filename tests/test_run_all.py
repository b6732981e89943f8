"""The runner of the experiments: what is finished, absent or failing is told apart; quick runs stay quick."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.fixture(name="runner")
def _runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The runner with experiments of its own in an empty folder."""
    spec = importlib.util.spec_from_file_location("run_all", EXPERIMENTS / "run_all.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run_all", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_experiment_is_there_and_has_the_quick_form_that_it_claims(runner: ModuleType) -> None:
    assert {experiment.script for experiment in runner.EXPERIMENTS} >= {"huelder", "giffon", "kissel_diepold"}
    for experiment in runner.EXPERIMENTS:
        source = (EXPERIMENTS / f"{experiment.script}.py").read_text(encoding="utf-8")
        if experiment.quick:
            assert "parser(__doc__)" in source  # the experiments' common one, which has --quick
            assert "quick=" in source  # a file of its own
        if not experiment.by_row:
            assert '"results"' in source or "RESULTS" in source


def test_results_of_quick_runs_lie_apart_from_full_ones() -> None:
    for quick in EXPERIMENTS.glob("results/*_quick.json"):
        assert "--quick" in json.loads(quick.read_text(encoding="utf-8"))["command"]
    for full in EXPERIMENTS.glob("results/*.json"):
        record = json.loads(full.read_text(encoding="utf-8"))
        assert "command" in record
        assert full.stem.endswith("_quick") or "--quick" not in record["command"]


def test_a_whole_run_from_nothing_keeps_its_times(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "experiments"
    (here / "results").mkdir(parents=True)
    source = "import pathlib, time\nwhile time.process_time() < 0.3: pass\n"
    (here / "busy.py").write_text(
        f"{source}pathlib.Path('experiments/results/busy_quick.json').write_text('{{}}')"
    )
    monkeypatch.setattr(runner, "HERE", here)
    monkeypatch.setattr(runner, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(runner, "EXPERIMENTS", (runner.Experiment("busy"),))
    kept = here / "results" / "run_all_quick.json"
    for goes_on in (False, True):
        kept.unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", ["run_all.py", "--quick"])
        with pytest.raises(SystemExit) as stop:
            runner.main()
        assert stop.value.code == 0
        assert kept.exists() != goes_on  # what a run took that went on from results says nothing
        if not goes_on:
            (row,) = json.loads(kept.read_text())["times"]
            assert row["name"] == "busy"
            assert 0.25 < row["processor_seconds"] < row["seconds"] + 0.5


def test_the_runner_tells_what_became_of_each(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = {
        "good": "import pathlib, sys\nran = pathlib.Path(__file__).with_suffix('.ran')\n"
        "ran.write_text(' '.join(sys.argv[1:]))",
        "absent": "print('skipped: no data')",
        "bad": "raise SystemExit('broken')",
        "old": "raise SystemExit('not to be run again')",
        "papers": "import pathlib; pathlib.Path(__file__).with_suffix('.ran').write_text('')",
    }
    for name, source in scripts.items():
        (tmp_path / f"{name}.py").write_text(source)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "old.json").write_text("{}")
    monkeypatch.setattr(runner, "HERE", tmp_path)
    monkeypatch.setattr(runner, "LOGS", tmp_path / "logs")
    made = [runner.Experiment(name) for name in ("good", "absent", "bad")]
    old = runner.Experiment("old", by_row=False, quick=False)
    monkeypatch.setattr(runner, "EXPERIMENTS", (*made, old))
    monkeypatch.setattr(sys, "argv", ["run_all.py"])
    with pytest.raises(SystemExit) as stop:
        runner.main()
    assert stop.value.code == 1
    shown = capsys.readouterr().out
    for told in ("good: done", "absent: skipped: no data", "bad: failed: see", "finished before"):
        assert told in shown
    assert "broken" in (tmp_path / "logs" / "bad.log").read_text()
    assert ((tmp_path / "good.ran").read_text(), (tmp_path / "papers.ran").exists()) == ("", True)

    monkeypatch.setattr(sys, "argv", ["run_all.py", "good", "--quick"])
    (tmp_path / "papers.ran").unlink()
    with pytest.raises(SystemExit) as stop:
        runner.main()
    assert stop.value.code == 0
    assert (tmp_path / "good.ran").read_text() == "--quick"
    assert not (tmp_path / "papers.ran").exists()
    assert (tmp_path / "logs" / "good_quick.log").exists()


def test_the_number_of_rows_is_that_of_the_grid(runner: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    giffon = importlib.import_module("giffon")
    (rows,) = [experiment.rows for experiment in runner.EXPERIMENTS if experiment.script == "giffon"]
    layers = 4 + 20  # of LeNet-5 and ResNet-20
    memory = sum(len(giffon.METHODS[method][0]) for method in giffon.IN_MEMORY)
    assert rows == layers * len(giffon.SIZES) + 2 * memory + len(list(giffon.wanted(quick=False)))
    for experiment in runner.EXPERIMENTS:
        count, seconds = experiment.measured()
        assert bool(count) == experiment.results(quick=False).exists()
        assert seconds >= 0
