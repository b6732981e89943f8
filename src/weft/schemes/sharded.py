"""Weights that lie in parts on several processes (FSDP), for networks that do not fit on one."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from weft.schemes.processes import Several


class Sharded(Several):
    """One process among others, each of which holds a part of every weight (FSDP)."""

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def state(self, model: nn.Module) -> dict[str, Any]:
        return {name: self.whole(value) for name, value in model.state_dict().items()}

    def put(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        own = model.state_dict()
        model.load_state_dict({name: _spread(value, own[name]) for name, value in state.items()})

    def optimiser_state(self, model: nn.Module, optimiser: Optimizer) -> dict[str, Any]:
        return tree_map_only(DTensor, self.whole, optimiser.state_dict())

    def put_optimiser(self, model: nn.Module, optimiser: Optimizer, state: Mapping[str, Any]) -> None:
        optimiser.load_state_dict(dict(state))
        for parameter, held in optimiser.state.items():
            for name, value in held.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    held[name] = _spread(value, parameter)


def _spread(value: Any, like: Any) -> Any:
    """A whole tensor in parts, as another one lies."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
