"""Timing as a user asks for it: a network, a layer, families; what is written down and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.test_cli import weft
from weft import bench
from weft.measure import time_alternating
from weft.structures import families, from_text
from weft.structures.low_rank import LowRank

KEYS = {
    "name",
    "shape",
    "batch",
    "threads",
    "cache",
    "dense",
    "structured",
    "multiply_adds",
    "bytes",
    "ratio",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_timed_at_every_combination_and_beside_the_dense_product(dtype: torch.dtype) -> None:
    member = LowRank(3).initialise((20, 30)).to(dtype)
    rows = bench.compare_layers(
        [member], batches=[1, 4], thread_counts=[1, 2], caches=bench.CACHES, seconds=0.01
    )
    assert {(row.batch, row.threads, row.cache) for row in rows} == {
        (batch, count, cache) for batch in (1, 4) for count in (1, 2) for cache in ("warm", "cold")
    }
    for row in rows:
        assert row.dense.calls == row.structured.calls >= 15
        assert row.ratio == row.structured.median / row.dense.median
        assert (row.bytes, row.multiply_adds) == (0.25, 0.25)


def test_a_slower_network_shows_as_slower() -> None:
    small, large = nn.Linear(8, 8), nn.Sequential(*(nn.Linear(1500, 1500) for _ in range(2)))
    wide = nn.Sequential(nn.Linear(8, 1500), large, nn.Linear(1500, 8))
    row = bench.compare_networks(wide, small, torch.zeros(1, 8), batches=[1], seconds=0.05)[0]
    assert row.ratio < 0.5


def test_what_comes_before_a_call_is_done_each_time_and_not_timed() -> None:
    done: list[object] = []

    def before(run: object) -> None:
        done.append(run)
        torch.zeros(1 << 20).add_(1).sum()

    calls = {"a": lambda: None, "b": lambda: None}
    timings = time_alternating(calls, seconds=0.0, before=before)
    assert done == list(calls.values()) * timings["a"].calls
    assert all(timing.median < 1e-4 for timing in timings.values())


def test_members_come_nearest_to_the_share() -> None:
    members, left_out = bench.members_of_size(list(families().values()), (60, 80), 0.25)
    assert len(members) + len(left_out) == len(families())
    low_rank = next(member for member in members if isinstance(member.structure, LowRank))
    assert low_rank.structure == min(
        LowRank.candidates((60, 80)), key=lambda candidate: abs(candidate.parameter_count((60, 80)) - 1200)
    )
    quantized = next(member for member in members if type(member.structure).__name__ == "Quantized")
    assert (
        0.9 < quantized.cost().bytes / (0.25 * 60 * 80 * 4) < 1.1
    )  # by bytes: its parameters are always all


def test_structures_are_read_as_they_are_written() -> None:
    for text in ("LowRank(rank=8)", "SparseProduct(factors=2, sparsity=14, algorithm=random)", "Dense()"):
        assert str(from_text(text)) == text
    nested = from_text("Pruned(density=0.3, of=LowRank(rank=4))")
    assert str(from_text(str(nested))) == str(nested)
    for text in ("", "LowRank", "LowRank(8)", "rank=8", "LowRank(rank=-)", "LowRank(**{})", "f(x=a+b)"):
        with pytest.raises(ValueError, match="structure must be Family"):
            from_text(text)


def test_largest_cache_is_found(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "32M", "1M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert bench.cache_bytes(tmp_path) == 32 * 2**20


def test_a_convolution_and_an_unknown_cache_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape must be \(outputs, inputs\), got \(4, 3, 3, 3\)"):
        bench.compare_layers([LowRank(2).initialise((4, 3, 3, 3))])
    with pytest.raises(ValueError, match="cache must be one of 'warm', 'cold'"):
        bench.compare_layers([], caches=["hot"])


def test_the_command_times_layers_and_writes_them_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "bench --layer 20x30 --structure LowRank(rank=3) --families LowRank --share 0.5 --batches 1,2"
    assert weft(monkeypatch, f"{command} --threads 1 --cache both --seconds 0.01 -o bench.json") == 0
    assert "LowRank(rank=3)" in capsys.readouterr().out
    written = json.loads((tmp_path / "bench.json").read_text())
    assert len(written["rows"]) == 2 * 2 * 2
    assert all(set(row) == KEYS for row in written["rows"])
    assert {"processor", "torch", "weft", "kernels", "commit"} <= set(written["environment"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "FILE or --layer must be one of the two, got neither"),
        ("x.safetensors --layer 3x4", "FILE or --layer must be one of the two, got both"),
        ("--layer 3", "--layer must be OUTPUTSxINPUTS, got '3'; e.g. --layer 1000x1280"),
        ("--layer 3x4", "--structure or --families must be given for --layer"),
        ("--layer 3x4 --structure Nothing(a=1)", "family must be one of"),
        ("--layer 3x4 --structure LowRank(rank=9)", "rank must be between 1 and 3"),
        ("--layer 3x4 --families LowRank --share 2", "--share must be"),
        ("--layer 3x4 --structure LowRank(rank=1) --cache hot", "--cache must be one of"),
        (
            "--layer 3x4 --structure LowRank(rank=1) -o no/such/b.json",
            "--output must be in an existing folder",
        ),
        ("small.safetensors", "--data must be given for FILE"),
    ],
)
def test_what_cannot_be_timed_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert weft(monkeypatch, f"bench {arguments}".strip()) == 2
    assert message in " ".join(capsys.readouterr().err.split())
