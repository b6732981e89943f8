"""More than one process: the same script under `torchrun` or `accelerate launch`, through Accelerate.

Every process reads the same batches and takes its share of the samples, so that the data and their order, and
with them the result, are those of one process. Gradients are averaged by Accelerate's wrapper: DDP, or FSDP
where `accelerate launch` was configured for it. Batch-norm layers see their own process's share of a batch.
"""

import contextlib
import copy
import importlib
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from weft import checks


def process_count() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def writes_files() -> bool:
    """Whether this process is the one that writes files: the first."""
    return int(os.environ.get("RANK", "0")) == 0


class Processes:
    """What the training loop asks of its surroundings; this one process alone."""

    count = 1

    def working_copy(self, model: nn.Module) -> nn.Module:
        """What trains in place of a network; here the network itself."""
        return model

    def return_to(self, model: nn.Module, work: nn.Module) -> None:
        """Puts what was trained into the network that was given.

        Args:
            model: the network.
            work: what `prepare` gave first.
        """

    def place(self, teacher: nn.Module | None) -> nn.Module | None:
        """What teaches, where the network trains."""
        return teacher

    def prepare(self, model: nn.Module, optimiser: Optimizer) -> tuple[nn.Module, nn.Module]:
        """Gets a network ready.

        Args:
            model: the network.
            optimiser: over its parameters; changed in place.

        Returns:
            What holds the weights, by the network's own names, and what is called in training.
        """
        return model, model

    def seed_step(self, seed: int) -> None:
        """Lets processes draw differently, in dropout for example, whatever they drew before.

        Args:
            seed: the step's.
        """

    def share(self, batch: Any, samples: int) -> tuple[Any, int]:
        """This process's samples.

        Args:
            batch: a batch.
            samples: how many samples it holds.

        Returns:
            The part, and its number of samples.
        """
        return batch, samples

    def backward(self, loss: Tensor, called: nn.Module, *, last: bool) -> None:
        """Propagates gradients back.

        Args:
            loss: this process's part of the loss.
            called: what was called.
            last: whether the step ends with it, so that gradients are exchanged.
        """
        loss.backward()

    def total(self, value: float) -> float:
        """The sum of a number over the processes."""
        return value

    def agree(self, value: float) -> float:
        """The first process's number."""
        return value

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor of which every process may hold a part."""
        return tensor

    def state(self, model: nn.Module) -> dict[str, Any]:
        """The whole state of the network."""
        return model.state_dict()

    def put(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Undoes `state`."""
        model.load_state_dict(state)

    def optimiser_state(self, model: nn.Module, optimiser: Optimizer) -> dict[str, Any]:
        """The whole state of the optimiser."""
        return optimiser.state_dict()

    def put_optimiser(self, model: nn.Module, optimiser: Optimizer, state: Mapping[str, Any]) -> None:
        """Undoes `optimiser_state`."""
        optimiser.load_state_dict(dict(state))


class Several(Processes):
    """One process among others; the weights lie in every process (DDP)."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.count = accelerator.num_processes
        self.rank = accelerator.process_index

    def working_copy(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model)

    def return_to(self, model: nn.Module, work: nn.Module) -> None:
        model.load_state_dict(self.state(work))

    def place(self, teacher: nn.Module | None) -> nn.Module | None:
        return None if teacher is None else copy.deepcopy(teacher).to(self.accelerator.device)

    def prepare(self, model: nn.Module, optimiser: Optimizer) -> tuple[nn.Module, nn.Module]:
        called, _ = self.accelerator.prepare(model, optimiser)
        return self.accelerator.unwrap_model(called), called

    def seed_step(self, seed: int) -> None:
        torch.manual_seed(seed * self.count + self.rank)

    def share(self, batch: Any, samples: int) -> tuple[Any, int]:
        first, beyond = (samples * place // self.count for place in (self.rank, self.rank + 1))
        if first == beyond:  # every process has to run: one without samples takes one that counts nothing
            return _cut(batch, slice(0, 1), samples), 0
        return _cut(batch, slice(first, beyond), samples), beyond - first

    def backward(self, loss: Tensor, called: nn.Module, *, last: bool) -> None:
        with contextlib.nullcontext() if last else self.accelerator.no_sync(called):
            self.accelerator.backward(loss * self.count)  # gradients are averaged, the parts are to be added

    def total(self, value: float) -> float:
        number = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        dist.all_reduce(number)
        return float(number)

    def agree(self, value: float) -> float:
        number = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        dist.broadcast(number, 0)
        return float(number)


def processes() -> Processes:
    """This process's surroundings.

    Returns:
        One process alone, or one of those that a launcher started.

    Raises:
        ImportError: there are several processes and Accelerate is not installed.
        ValueError: Accelerate is configured for the first FSDP.
    """
    if process_count() == 1:
        return Processes()
    try:
        accelerate: Any = importlib.import_module("accelerate")
    except ImportError as error:
        expected = f"installed for {process_count()} processes"
        remedy = "pip install 'weft[train]'"
        raise ImportError(checks.fault("accelerate", expected, "nothing", remedy)) from error
    accelerator = accelerate.Accelerator(cpu=not torch.accelerator.is_available())
    plugin = getattr(accelerator.state, "fsdp_plugin", None)  # the state has it only where it is used
    if plugin is None:
        return Several(accelerator)
    if plugin.fsdp_version != 2:
        got = f"version {plugin.fsdp_version}"
        raise ValueError(checks.fault("FSDP", "of version 2", got, "accelerate launch --fsdp_version 2 ..."))
    from weft.schemes.sharded import Sharded  # torch's distributed tensors take a second to import

    return Sharded(accelerator)


def _cut(value: Any, part: slice, samples: int) -> Any:
    """The tensors of a batch that hold one row per sample, cut; all else as it is."""
    if isinstance(value, Tensor):
        return value[part] if value.ndim and value.shape[0] == samples else value
    if isinstance(value, Mapping):
        return {name: _cut(item, part, samples) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cut(item, part, samples) for item in value]
    return value
