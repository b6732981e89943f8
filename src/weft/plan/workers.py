"""Independent pieces of work in this process, in a pool of processes, or on a Ray cluster."""

import importlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from weft import checks

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")

# How often a piece of work is begun again after the worker that had it was lost.
_TRIES = 3


def run(
    function: Callable[[Task], Outcome],
    tasks: Sequence[Callable[[], Task]],
    *,
    workers: int = 1,
    ray: str | None = None,
) -> Iterator[tuple[int, Outcome]]:
    """Applies a function to tasks, in whatever order they are done.

    No more tasks than workers, and one to follow, are in memory at a time: a task is made when it is sent.
    What a lost worker had is done again; a task that loses worker after worker is a RuntimeError.

    Args:
        function: a function of a module, which other processes can import.
        tasks: what makes each argument.
        workers: processes with one thread each; 1 works in this process with torch's own threads.
        ray: "local" or the address of a Ray cluster, in place of the processes.

    Yields:
        A task's number and its outcome.
    """
    if ray is not None:
        yield from _on_ray(function, tasks, ray)
    elif workers > 1 and len(tasks) > 1:
        yield from _in_processes(function, tasks, min(workers, len(tasks)))
    else:
        for number, make in enumerate(tasks):
            yield number, function(make())


def default_workers() -> int:
    """One process per core that this process may use.

    Returns:
        At least 1.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_thread() -> None:
    torch.set_num_threads(1)


def _in_processes(
    function: Callable[[Any], Any], tasks: Sequence[Callable[[], Any]], workers: int
) -> Iterator[tuple[int, Any]]:
    # Spawned, not forked: torch's threads do not survive a fork.
    def pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)

    waiting = deque(range(len(tasks)))
    tries = dict.fromkeys(range(len(tasks)), 0)
    running: dict[Future[Any], int] = {}
    executor = pool()
    try:
        while waiting or running:
            try:
                while waiting and len(running) <= workers:
                    running[executor.submit(function, tasks[waiting[0]]())] = waiting[0]
                    waiting.popleft()
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    outcome = future.result()  # before it is taken off: a lost worker's work stays
                    yield running.pop(future), outcome
            except BrokenProcessPool as error:
                for number in running.values():
                    tries[number] += 1
                    if tries[number] >= _TRIES:
                        raise RuntimeError(
                            f"worker processes ended {_TRIES} times while at task {number} (out of memory?); "
                            "use fewer workers, or fewer families"
                        ) from error
                waiting.extendleft(sorted(running.values(), reverse=True))
                running = {}
                executor.shutdown(wait=False, cancel_futures=True)
                executor = pool()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _on_ray(
    function: Callable[[Any], Any], tasks: Sequence[Callable[[], Any]], address: str
) -> Iterator[tuple[int, Any]]:
    try:
        ray: Any = importlib.import_module("ray")  # an optional package
    except ImportError as error:
        raise ImportError(
            checks.fault("ray", "installed", "no such package", 'pip install "weft[ray]"')
        ) from error
    if not ray.is_initialized():
        ray.init(address=None if address == "local" else address, log_to_driver=False)
    remote = ray.remote(num_cpus=1, max_retries=_TRIES)(_single_threaded)
    window = int(ray.cluster_resources().get("CPU", 1)) + 1
    waiting, running = deque(range(len(tasks))), {}
    while waiting or running:
        while waiting and len(running) < window:
            number = waiting.popleft()
            running[remote.remote(function, tasks[number]())] = number
        done, _ = ray.wait(list(running), num_returns=1)
        for reference in done:
            yield running.pop(reference), ray.get(reference)


def _single_threaded(function: Callable[[Any], Any], task: Any) -> Any:
    _one_thread()
    return function(task)
