"""Independent pieces of work in this process, in a pool of processes, or on a Ray cluster.

Memory is bounded on both sides. Here no more tasks than workers, and one to follow, are packed at a time.
There a worker that would need more than its share gets a MemoryError instead of the whole machine's memory:
on Linux the kernel refuses the allocation (RLIMIT_DATA), and Ray is told the same number, so that it places
no more tasks on a node than the node has memory for.
"""

import importlib
import math
import os
import pickle
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from weft import checks

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")

# How often a piece of work is tried where the worker that had it is lost.
_TRIES = 3
_BOUNDED = sys.platform == "linux"  # elsewhere RLIMIT_DATA does not count what allocators map


def run(
    function: Callable[[Task], Outcome],
    tasks: Sequence[Task],
    *,
    workers: int = 1,
    ray: str | None = None,
    memory: int | None = None,
    alone: float = 0.0,
) -> Iterator[tuple[int, Outcome]]:
    """Applies a function to tasks, in whatever order they are done.

    A task is packed when it is sent. What a lost worker had is done again; a task that loses worker after
    worker is a ChildProcessError, one that needs more memory than its worker may take a MemoryError.

    Args:
        function: a function of a module, which other processes can import.
        tasks: the arguments.
        workers: processes with one thread each; 1 works in this process with torch's own threads.
        ray: "local" or the address of a Ray cluster, in place of the processes.
        memory: bytes that a worker may take beyond what it holds when idle, its task and outcome included;
            where None, the machine's (on Ray, the poorest node's) shared out evenly. Work in this process is
            not bounded.
        alone: seconds that this process works alone before it starts others, which takes it seconds; none
            where a bound on memory is given.

    Yields:
        A task's number and its outcome.

    Raises:
        ValueError: the bound is below 1, or given where the system cannot hold it.
    """
    if memory is not None:
        checks.integer_between("memory", memory, 1, None)
        if not _BOUNDED:
            expected = "left out on a system other than Linux, which does not hold it"
            raise ValueError(checks.fault("memory", expected, memory, "leave it out"))
    if ray is not None:
        yield from _on_ray(function, tasks, ray, memory)
        return
    started, done = time.perf_counter(), 0
    alone = math.inf if workers == 1 else 0.0 if memory is not None else alone
    while done < len(tasks) and (done == len(tasks) - 1 or time.perf_counter() - started < alone):
        yield done, function(tasks[done])
        done += 1
    rest = tasks[done:]
    if rest:
        for number, outcome in _in_processes(function, rest, min(workers, len(rest)), memory):
            yield done + number, outcome


def default_workers() -> int:
    """One process per core that this process may use.

    Returns:
        At least 1.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory() -> int:
    """The memory that this process and its children may have together.

    Returns:
        Bytes: those of the machine, or of the control group where that is less.
    """
    own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")
    text = group.read_text(encoding="ascii").strip() if group.is_file() else ""
    return min(own, int(text)) if text.isdigit() else own


# ------------------------------------------------------------------------------------------------------------
# In a worker


def _work(function: Callable[[Any], Any], packed: bytes, memory: int | None) -> bytes:
    # Tasks and outcomes travel as bytes: torch's own way of sending tensors between processes keeps a file
    # open for each, and ends with the process that made them.
    torch.set_num_threads(1)
    with _memory_bound(memory):
        return pickle.dumps(function(pickle.loads(packed)), protocol=5)


@contextmanager
def _memory_bound(memory: int | None) -> Generator[None]:
    """Refuses this process more than so many bytes beyond those that it holds."""
    if memory is None or not _BOUNDED:
        yield
        return
    import resource  # Unix alone has it

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])  # data and stacks
    before = resource.getrlimit(resource.RLIMIT_DATA)
    held = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (held + memory, before[1]))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            expected = "enough for a layer, its Grams and the fit's own needs"
            remedy = "use fewer workers, give each more (--worker-memory), or leave out families"
            got = f"{memory / 2**20:.0f} MiB"
            raise MemoryError(checks.fault("memory per worker", expected, got, remedy)) from error
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


# ------------------------------------------------------------------------------------------------------------
# Where workers are


def _in_processes(
    function: Callable[[Any], Any], tasks: Sequence[Any], workers: int, memory: int | None
) -> Iterator[tuple[int, Any]]:
    # Spawned, not forked: torch's threads do not survive a fork.
    def pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))

    share = machine_memory() // workers if memory is None else memory
    waiting = deque(range(len(tasks)))
    tries = dict.fromkeys(range(len(tasks)), 0)
    running: dict[Future[bytes], int] = {}
    executor = pool()
    try:
        while waiting or running:
            try:
                while waiting and len(running) <= workers:
                    packed = pickle.dumps(tasks[waiting[0]], protocol=5)
                    running[executor.submit(_work, function, packed, share)] = waiting[0]
                    waiting.popleft()
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    outcome = future.result()  # before it is taken off: a lost worker's work stays
                    yield running.pop(future), pickle.loads(outcome)
            except BrokenProcessPool as error:
                for number in running.values():
                    tries[number] += 1
                    if tries[number] >= _TRIES:
                        raise _lost(number) from error
                waiting.extendleft(sorted(running.values(), reverse=True))
                running = {}
                executor.shutdown(wait=False, cancel_futures=True)
                executor = pool()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _lost(number: int) -> ChildProcessError:
    return ChildProcessError(
        f"workers ended {_TRIES} times while at task {number}: out of memory, or started by a script without "
        "`if __name__ == '__main__':`; use fewer workers or fewer families, or add that line"
    )


def _on_ray(
    function: Callable[[Any], Any], tasks: Sequence[Any], address: str, memory: int | None
) -> Iterator[tuple[int, Any]]:
    try:
        ray: Any = importlib.import_module("ray")  # an optional package
    except ImportError as error:
        raise ImportError(
            checks.fault("ray", "installed", "no such package", 'pip install "weft[ray]"')
        ) from error
    if not ray.is_initialized():
        ray.init(
            address=address, log_to_driver=False, include_dashboard=False if address == "local" else None
        )
    share = _share_of_nodes(ray, memory)
    remote = ray.remote(num_cpus=1, memory=share, max_retries=_TRIES - 1)(_work)
    waiting, running = deque(range(len(tasks))), {}
    try:
        while waiting or running:
            while waiting and len(running) <= ray.cluster_resources().get("CPU", 0):  # nodes come and go
                number = waiting.popleft()
                # Kept by Ray on this node until it is done, for the case that another node is lost.
                running[remote.remote(function, pickle.dumps(tasks[number], protocol=5), share)] = number
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                try:
                    outcome = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except ray.exceptions.RayError as error:
                    raise _lost(running[reference]) from error
                yield running.pop(reference), pickle.loads(outcome)
    finally:
        for reference in running:
            ray.cancel(reference)


def _share_of_nodes(ray: Any, memory: int | None) -> int:
    """The memory of a worker on a cluster, which at least one node must have."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)]
    if not nodes:
        got = f"{len(ray.nodes())} without"
        raise ValueError(checks.fault("ray", "a cluster with a node that has CPUs", got, "start one"))
    most = int(max(node["memory"] for node in nodes))
    if memory is None:
        return int(min(node["memory"] // max(1, node["CPU"]) for node in nodes))
    if memory > most:
        expected = f"at most {most}, what the richest node of the Ray cluster offers"
        raise ValueError(checks.fault("memory", expected, memory, "give less, or add a larger node"))
    return memory
