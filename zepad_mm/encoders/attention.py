"""Attention with separate q, k, v and out projections, so that LoRA is exactly W + dW.

Inside ``torch.nn.MultiheadAttention`` peft adds the delta of ``out_proj`` twice, and a fused kernel reads the weights
past the adapter, which then gets no gradient. Both end when the four projections are plain Linears.
"""

from __future__ import annotations

import functools
from typing import Any

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


class SeparateSelfAttention(nn.Module):
    """open_clip's own ``Attention``, whose q, k and v are one bare weight, from four Linears; same call."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        if fused.logit_scale is not None:
            raise ValueError("attention with scaled cosines is not supported for LoRA")
        self.num_heads = fused.num_heads
        width = fused.in_proj_weight.shape[1]
        bias = fused.in_proj_bias is not None
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.ln_q, self.ln_k, self.ln_inner = fused.ln_q, fused.ln_k, fused.ln_inner
        self.head_scale, self.attn_drop = fused.head_scale, fused.attn_drop
        self.out_proj, self.out_drop = fused.out_proj, fused.out_drop
        with torch.no_grad():
            biases = fused.in_proj_bias.chunk(3) if bias else (None, None, None)
            linears = (self.q_proj, self.k_proj, self.v_proj)
            for linear, weight, offset in zip(linears, fused.in_proj_weight.chunk(3), biases, strict=True):
                _copy(linear, weight, offset)
        self.to(device=fused.in_proj_weight.device, dtype=fused.in_proj_weight.dtype)
        self.train(fused.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, L, D) to (B, L, D); a boolean mask is True where attention is forbidden."""
        q, k, v = (
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.view(-1, self.num_heads, *attn_mask.shape[1:])
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(self.ln_q(q), self.ln_k(k), v, attn_mask=attn_mask, dropout_p=dropout)
        if self.head_scale is not None:
            mixed = mixed * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(mixed.transpose(1, 2).flatten(2))))


class SeparateAttentionPool(nn.Module):
    """The attention pooling of CLIP's ResNets with Linears that are called, not read past; only the pooled query."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.num_heads = fused.num_heads
        self.positional_embedding = fused.positional_embedding
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = fused.q_proj, fused.k_proj, fused.v_proj, fused.c_proj
        self.train(fused.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) to (B, output)."""
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.positional_embedding.to(x.dtype)
        q, k, v = (
            linear(part).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear, part in ((self.q_proj, tokens[:, :1]), (self.k_proj, tokens), (self.v_proj, tokens))
        )
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))


def _copy(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight.copy_(weight)
    if bias is not None and linear.bias is not None:
        linear.bias.copy_(bias)


def _separate(module: nn.Module) -> nn.Module | None:
    """The same attention with separate projections; None for any other module."""
    if isinstance(module, nn.MultiheadAttention):
        return SeparateAttention(module)
    if isinstance(getattr(module, "in_proj_weight", None), nn.Parameter) and hasattr(module, "scaled_cosine"):
        return SeparateSelfAttention(module)
    if all(hasattr(module, name) for name in ("c_proj", "q_proj", "k_proj", "v_proj", "positional_embedding")):
        return None if isinstance(module, SeparateAttentionPool) else SeparateAttentionPool(module)
    return None


def _plain_forward(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any
) -> tuple[Tensor, Tensor | None]:
    """``nn.MultiheadAttention.forward`` for self-attention that asks for no weights; all else goes the usual way."""
    asked = set(more) <= {"need_weights", "attn_mask"} and more.get("need_weights", True) is False
    if rest or not asked or not (query is key is value) or query.ndim != 3 or attention.in_proj_weight is None:
        return type(attention).forward(attention, query, key, value, *rest, **more)
    tokens = query if attention.batch_first else query.transpose(0, 1)
    projected = F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in projected.chunk(3, -1))
    mask = more.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        mask = ~mask
    if mask is not None and mask.ndim == 3:
        mask = mask.view(-1, attention.num_heads, *mask.shape[1:])
    dropout = attention.dropout if attention.training else 0.0
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2).flatten(2)
    mixed = attention.out_proj(mixed)
    return (mixed if attention.batch_first else mixed.transpose(0, 1)), None


def use_fast_attention(module: nn.Module) -> int:
    """Make every ``nn.MultiheadAttention`` below ``module`` compute the same in fewer steps; returns how many changed.

    In place, and no weight moves or changes its name. torch's own forward takes a third longer where
    a gradient with respect to the input is needed, as in attacks.
    """
    found = [
        part
        for part in module.modules()
        if type(part) is nn.MultiheadAttention and part.bias_k is None and not part.add_zero_attn
    ]
    slow = [part for part in found if "forward" not in vars(part)]
    for part in slow:
        part.forward = functools.partial(_plain_forward, part)  # type: ignore[method-assign]
    return len(slow)


def unfuse_attention(module: nn.Module) -> int:
    """Replace every fused attention below ``module`` in place; returns how many there were."""
    count = 0
    for name, child in list(module.named_children()):
        separate = _separate(child)
        if separate is not None:
            setattr(module, name, separate)
            count += 1
        else:
            count += unfuse_attention(child)
    return count
