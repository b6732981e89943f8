"""Multi-head attention as four linear layers that weft can replace, where PyTorch's own joins three."""

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft import checks

__all__ = ["SplitAttention", "split_attention"]


def split_attention(model: nn.Module) -> nn.Module:
    """Replaces every `nn.MultiheadAttention` by an equal `SplitAttention`, in place.

    PyTorch's module applies its projections by functions, where no survey sees what flows through them. Left
    as they are: those with `add_bias_kv` or `add_zero_attn`, and subclasses, whose forward may be another.

    Args:
        model: the network.

    Returns:
        The same network, or what stands for it where it is an attention itself.

    Examples:
        >>> model = split_attention(nn.TransformerEncoderLayer(16, 2, 32))
        >>> [name for name, layer in model.self_attn.named_modules() if isinstance(layer, nn.Linear)]
        ['q_proj', 'k_proj', 'v_proj', 'out_proj']
    """
    if _can_split(model):
        return SplitAttention(model)
    made: dict[nn.Module, SplitAttention] = {}  # one that stands in several places stays one
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # noqa: SLF001  (children name a shared one once)
            if child is not None and _can_split(child):
                if child not in made:
                    made[child] = SplitAttention(child)
                setattr(parent, name, made[child])
    for parent in model.modules():
        # Its shortcut hands the matrices of the attentions to one function.
        if isinstance(parent, nn.TransformerEncoder) and any(
            isinstance(module, SplitAttention) for module in parent.modules()
        ):
            parent.use_nested_tensor = False
    return model


def _can_split(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    return type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn


class SplitAttention(nn.Module):
    """What `nn.MultiheadAttention` computes, of four linear layers: softmax(Q Kᵀ / √d + mask) V, projected.

    Takes and gives what that module does: (query, key, value) of shape (batch, length, features) where
    `batch_first`, else (length, batch, features), or (length, features); boolean masks are true where nothing
    may be seen. (Vaswani et al. 2017, section 3.2.2.)

    Args:
        attention: the module whose values it takes over; shared, not copied, but for the joint matrix, whose
            three parts become parameters of their own.
    """

    # What PyTorch's transformer layers ask an attention before they pass it by.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.head_dim, self.dropout = attention.head_dim, attention.dropout
        self.batch_first = attention.batch_first
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.detach().chunk(3)
        else:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        biases: Any = (None,) * 3
        if attention.in_proj_bias is not None:
            biases = attention.in_proj_bias.detach().chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight.detach().clone(), None if bias is None else bias.clone())
            for weight, bias in zip(weights, biases, strict=True)
        )
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        # In this order: whether a given mask is causal is data, which a compiler cannot branch on.
        if attn_mask is None and is_causal:
            remedy = "pass nn.Transformer.generate_square_subsequent_mask(length)"
            raise ValueError(checks.fault("attn_mask", "given with is_causal", "None", remedy))
        batched = query.ndim == 3
        if not batched:
            query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        q, k, v = (
            project(tensor).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for project, tensor in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = self._mask(q, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = functional.dropout(weights, dropout)
            heads = weights @ v
        else:
            heads = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(heads.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _mask(self, q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """Both masks as one that is added to the scores, broadcast to (batch, heads, length, length)."""
        mask = None
        if attn_mask is not None:
            mask = _added(attn_mask, q.dtype)
            if mask.ndim == 3:  # one per head
                mask = mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q.dtype)[:, None, None]
            mask = padding if mask is None else mask + padding
        return mask

    def extra_repr(self) -> str:
        """What the layers do not show."""
        return f"num_heads={self.num_heads}, dropout={self.dropout}, batch_first={self.batch_first}"


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as minus infinity where it is true; another one as it is."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of given values."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None:
            parameter = values if isinstance(values, nn.Parameter) else nn.Parameter(values)
            setattr(layer, name, parameter)
    return layer
