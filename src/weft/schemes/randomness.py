"""The global random generators of torch, numpy and Python: seeded together, kept in checkpoints together."""

import random
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seeds torch's, numpy's and Python's global generators.

    Args:
        seed: any whole number.
    """
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The state of torch's, numpy's and Python's global generators.

    Returns:
        What `set_random_state` takes; fit for a checkpoint.
    """
    numbers: Any = np.random.get_state(legacy=False)
    state = numbers["state"]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {**numbers, "state": {**state, "key": torch.from_numpy(state["key"].astype(np.int64))}},
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts the global generators back.

    Args:
        state: what `random_state` gave.
    """
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    numbers = state["numpy"]
    key = numbers["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numbers, "state": {**numbers["state"], "key": key}})
    random.setstate(state["python"])


@contextmanager
def own_randomness() -> Generator[None, None, None]:
    """Leaves the global generators afterwards as they were."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
