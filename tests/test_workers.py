"""Work in processes and on Ray: the same results, what a lost worker had done again, memory bounded."""

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from weft.plan import workers
from weft.plan.error_curves import error_curves
from weft.structures.low_rank import LowRank
from weft.structures.quantized import Quantized
from weft.survey import Survey

MIB = 2**20


def _dies_once(folder: str) -> int:
    mark = Path(folder) / "died"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 7


def _dies(_: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def _grows(mebibytes: int) -> int:
    """How many MiB of memory are taken by so many MiB."""
    held = torch.ones(1)
    before = _resident()
    held = torch.ones(mebibytes, MIB // 8, dtype=torch.float64)
    return (_resident() - before) // MIB + len(held) - mebibytes


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_what_a_lost_worker_had_is_done_again(tmp_path: Path) -> None:
    outcomes = dict(workers.run(_dies_once, [str(tmp_path)] * 3, workers=2))
    assert outcomes == {0: 7, 1: 7, 2: 7}


def test_work_that_loses_every_worker_is_an_error() -> None:
    with pytest.raises(ChildProcessError, match="workers ended 3 times while at task 0"):
        list(workers.run(_dies, [0, 1], workers=2))


def test_an_error_in_a_worker_is_that_error() -> None:
    with pytest.raises(TypeError, match="abs"):
        list(workers.run(abs, ["text", "text"], workers=2))


def test_a_worker_gets_no_more_memory_than_its_share() -> None:
    outcomes = dict(workers.run(_grows, [100, 200], workers=2, memory=300 * MIB))
    assert outcomes[0] >= 95
    assert outcomes[1] >= 195
    with pytest.raises(MemoryError, match="memory per worker must be enough .* got 300 MiB; use fewer"):
        list(workers.run(_grows, [100, 400], workers=2, memory=300 * MIB))


def test_a_bound_ends_with_its_task() -> None:
    # One worker has them all in turn: the second is not refused because of the first.
    outcomes = dict(workers.run(_grows, [100] * 5, workers=2, memory=150 * MIB))
    assert len(outcomes) == 5


def _process(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def test_what_takes_few_seconds_starts_no_processes() -> None:
    outcomes = dict(workers.run(_process, [0.0] * 4, workers=2, alone=60.0))
    assert outcomes == dict.fromkeys(range(4), os.getpid())


def test_processes_join_in_once_it_takes_longer() -> None:
    outcomes = dict(workers.run(_process, [0.2] * 5, workers=2, alone=0.3))
    assert sorted(outcomes) == [0, 1, 2, 3, 4]
    assert outcomes[0] == outcomes[1] == os.getpid()
    assert os.getpid() not in {outcomes[2], outcomes[3], outcomes[4]}


def test_the_machine_has_as_much_memory_as_the_kernel_says() -> None:
    total = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal")
    )
    assert 0 < workers.machine_memory() <= total


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    torch.manual_seed(0)
    # The second layer's Gram is a view, the third one's weight a part of something larger.
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, groups=1), nn.Flatten(), nn.Linear(8 * 36, 24, bias=True), nn.Linear(24, 10)
    )
    model[3].weight = nn.Parameter(torch.randn(100, 24)[20:30])
    return model


@pytest.fixture(scope="module")
def surveyed(network: nn.Sequential) -> Survey:
    generator = torch.Generator().manual_seed(1)
    return weft.survey(network, [torch.randn(64, 3, 8, 8, generator=generator)], teacher=network)


PLAN = {"0": LowRank(2), "2": Quantized(4, of=LowRank(5)), "3": Quantized(3)}


def the_same(one: nn.Module, two: nn.Module) -> bool:
    own, other = one.state_dict(), two.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As a worker has: products by several threads are summed in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_processes_fit_the_same_network_bitwise(network: nn.Sequential, surveyed: Survey) -> None:
    alone, log = weft.compress(network, PLAN, surveyed)
    together, other_log = weft.compress(network, PLAN, surveyed, workers=2)
    assert the_same(alone, together)
    assert [{**entry, "seconds": 0} for entry in log] == [{**entry, "seconds": 0} for entry in other_log]


@pytest.mark.usefixtures("one_thread")
def test_a_generator_means_the_same_network_in_processes(network: nn.Sequential) -> None:
    plan = {"2": LowRank(5, method="randomized"), "3": LowRank(3, method="randomized")}

    def small(seed: int, workers: int) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        return weft.compress(network, plan, generator=generator, workers=workers).model

    assert the_same(small(0, 1), small(0, 2))
    assert not the_same(small(0, 1), small(1, 1))


def test_layers_fitted_in_sequence_take_no_workers(network: nn.Sequential) -> None:
    batch = torch.randn(4, 3, 8, 8)
    with pytest.raises(ValueError, match="workers or ray must be left out with sequential"):
        weft.compress(network, PLAN, batches=[batch], sequential=True, workers=2)


# ------------------------------------------------------------------------------------------------------------
# Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray with a head node that computes nothing, so that all work is on the two others."""
    ray = pytest.importorskip("ray", reason='needs Ray: pip install "weft[ray]"')
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.workers = [cluster.add_node(num_cpus=1, memory=2**30) for _ in range(2)]
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def _where(marks: str) -> tuple[str, int]:
    """The Ray node that this runs on; long enough for a node to be lost meanwhile."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    mark = Path(marks) / f"{node}-{os.getpid()}-{time.time_ns()}"
    mark.touch()
    time.sleep(3)
    mark.write_text("done")
    return node, resource.getrlimit(resource.RLIMIT_DATA)[0]


def _kill_a_node_at_work(cluster: Any, marks: Path) -> None:
    """Ends the first node that has just begun a task, as kill -9 does."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for mark in marks.iterdir():
            if not mark.read_text() and time.time() - mark.stat().st_mtime < 1:
                doomed = next(node for node in cluster.workers if mark.name.startswith(node.node_id))
                cluster.remove_node(doomed, allow_graceful=False)
                cluster.workers.remove(doomed)
                return
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
class TestRay:
    def test_two_nodes_fit_the_same_network_bitwise(
        self, cluster: Any, network: nn.Sequential, surveyed: Survey
    ) -> None:
        alone, log = weft.compress(network, PLAN, surveyed)
        together, other_log = weft.compress(network, PLAN, surveyed, ray=cluster.address)
        assert the_same(alone, together)
        assert [entry["error"] for entry in log] == [entry["error"] for entry in other_log]

    def test_two_nodes_compute_the_same_curves_bitwise(self, cluster: Any, surveyed: Survey) -> None:
        alone = error_curves(surveyed, [LowRank, Quantized])
        assert error_curves(surveyed, [LowRank, Quantized], ray=cluster.address) == alone

    def test_work_is_on_both_nodes_and_its_memory_is_bounded(self, cluster: Any, tmp_path: Path) -> None:
        found = dict(workers.run(_where, [str(tmp_path)] * 4, ray=cluster.address, memory=300 * MIB))
        assert len({node for node, _ in found.values()}) == 2
        assert all(0 < limit < 2**40 for _, limit in found.values())
        with pytest.raises(MemoryError, match="memory per worker must be enough"):
            list(workers.run(_grows, [400], ray=cluster.address, memory=300 * MIB))
        with pytest.raises(ValueError, match="memory must be at most 1073741824, what the richest node"):
            list(workers.run(abs, [1], ray=cluster.address, memory=2**40))

    def test_an_error_on_a_node_is_that_error(self, cluster: Any) -> None:
        with pytest.raises(TypeError, match="abs"):
            list(workers.run(abs, ["text", "text"], ray=cluster.address))

    def test_a_lost_worker_is_replaced_and_hopeless_work_is_an_error(
        self, cluster: Any, tmp_path: Path
    ) -> None:
        assert dict(workers.run(_dies_once, [str(tmp_path)] * 3, ray=cluster.address)) == {0: 7, 1: 7, 2: 7}
        with pytest.raises(ChildProcessError, match="workers ended 3 times while at task 0"):
            list(workers.run(_dies, [0], ray=cluster.address))

    def test_what_a_lost_node_had_is_done_again(self, cluster: Any, tmp_path: Path) -> None:
        killer = threading.Thread(target=_kill_a_node_at_work, args=(cluster, tmp_path))
        killer.start()
        outcomes = dict(workers.run(_where, [str(tmp_path)] * 5, ray=cluster.address))
        killer.join()
        assert outcomes.keys() == set(range(5))
        marks = list(tmp_path.iterdir())
        unfinished = [mark for mark in marks if not mark.read_text()]
        assert len(unfinished) == 1
        assert len(marks) == 6  # what the lost node was at was begun twice, and nothing else
        assert {node for node, _ in outcomes.values()} == {node.node_id for node in cluster.workers}


def test_ray_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"ray must be installed, .*pip install \"weft\[ray\]\""):
        list(workers.run(abs, [1], ray="local"))
