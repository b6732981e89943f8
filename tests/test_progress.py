"""Progress where there is no terminal."""

import subprocess
import sys
import threading
import time

import pytest

import weft.progress
from weft.progress import track


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weft.progress, "EVERY", 0.05)


@pytest.mark.usefixtures("often")
def test_long_work_without_a_terminal_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for item in track(range(3), "fitting"):
        if item == 2:
            time.sleep(0.3)  # within one item, too
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines()[-1].startswith("fitting: 2 of 3 done after 0 s")
    assert "\x1b" not in told.err


def test_short_work_without_a_terminal_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(1000), "fitting")) == list(range(1000))
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("often")
def test_work_that_is_to_be_silent_is(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in track(range(3), "fitting", shown=False):
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("way", ["ends", "is left", "fails"])
def test_nothing_goes_on_when_the_work(way: str) -> None:
    before = threading.active_count()
    items = track(iter(range(3)), "fitting")
    next(items)
    assert threading.active_count() == before + 1
    if way == "ends":
        assert list(items) == [1, 2]
    elif way == "is left":
        items.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(ZeroDivisionError):
            list(track((1 // zero for zero in [0]), "fitting"))
        items.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_an_interrupted_script_ends_at_once() -> None:
    code = "from weft.progress import track\nnext(track(range(3), 'fitting'))\nraise SystemExit(3)"
    started = time.perf_counter()
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 3
    assert time.perf_counter() - started < 30  # the pause between two lines
