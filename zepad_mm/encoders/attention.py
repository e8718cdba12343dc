"""Attention with separate q, k, v and out projections, so that LoRA is W + dW and nothing else.

Inside ``torch.nn.MultiheadAttention`` peft adds the delta of ``out_proj`` twice, and a fused kernel reads the weights
past the adapter, which then gets no gradient. Both end when the four projections are plain Linears.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SeparateAttention(nn.Module):
    """Multi-head attention from four Linears and ``scaled_dot_product_attention``; same call as MultiheadAttention."""

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        if fused.bias_k is not None or fused.add_zero_attn:
            raise ValueError("MultiheadAttention with bias_k or add_zero_attn is not supported for LoRA")
        self.num_heads = fused.num_heads
        self.batch_first = fused.batch_first
        self.dropout = fused.dropout
        width = fused.embed_dim
        bias = fused.in_proj_bias is not None
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(fused.kdim or width, width, bias=bias)
        self.v_proj = nn.Linear(fused.vdim or width, width, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=fused.out_proj.bias is not None)
        self.train(fused.training)
        with torch.no_grad():
            if fused.in_proj_weight is not None:
                weights = fused.in_proj_weight.chunk(3)
            else:
                weights = (fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight)
            biases = fused.in_proj_bias.chunk(3) if bias else (None, None, None)
            for linear, weight, offset in zip((self.q_proj, self.k_proj, self.v_proj), weights, biases, strict=True):
                _copy(linear, weight, offset)
            _copy(self.out_proj, fused.out_proj.weight, fused.out_proj.bias)
        self.to(device=fused.out_proj.weight.device, dtype=fused.out_proj.weight.dtype)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """As ``nn.MultiheadAttention``; (B, L, D) if batch_first, else (L, B, D). Gives no attention weights."""
        if need_weights:
            raise ValueError("SeparateAttention gives no attention weights; call it with need_weights=False")
        if not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # True forbids in MultiheadAttention and allows in scaled_dot_product_attention
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.view(-1, self.num_heads, *attn_mask.shape[1:])
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        mixed = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return (mixed if self.batch_first else mixed.transpose(0, 1)), None

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _copy(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)


def unfuse_attention(module: nn.Module) -> int:
    """Replace every ``nn.MultiheadAttention`` below ``module`` in place; returns how many there were."""
    count = 0
    for name, child in list(module.named_children()):
        if isinstance(child, nn.MultiheadAttention):
            setattr(module, name, SeparateAttention(child))
            count += 1
        else:
            count += unfuse_attention(child)
    return count
