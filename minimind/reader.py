"""The model rearranged for sampling: the same function in fewer and faster operations.

Reading one token per row is bound by the number of operations and by how fast the weights come in.
So projections that see the same input become one product, and on CPUs the products go through
oneDNN: MKL, PyTorch's choice for float32, leaves AVX-512 unused on AMD (half the speed).

Left out: gradients and dropout. The weights are a copy; make a new Reader when they have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.model import (
    Block,
    KVCache,
    MiniMind,
    MoE,
    RMSNorm,
    apply_rotary,
    attend,
    rotary_embedding,
)

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)  # not public, so never relied on


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x·Wᵀ in the dtype of the weight, without gradients."""
    x = x.to(weight.dtype)
    on_cpu = weight.device.type == "cpu" and not torch.compiler.is_compiling()
    if ONEDNN and on_cpu and weight.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def _joined(modules: list[nn.Module], dtype: torch.dtype) -> Tensor:
    """Stack the weights of several projections; an adapter's update is added to its weight."""
    merged = [m.merged() if hasattr(m, "merged") else m for m in modules]
    return torch.cat([m.weight.detach() for m in merged]).to(dtype)


class _Layer:
    """One block with q, k, v joined, and gate and up."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.index, self.head_dim = attention.layer, attention.head_dim
        self.norms = block.input_layernorm, block.post_attention_layernorm
        self.qkv = _joined([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self.out = _joined([attention.o_proj], dtype)
        self.heads, self.kv_heads = (
            _joined([p], dtype).shape[0] // self.head_dim
            for p in (attention.q_proj, attention.k_proj)
        )
        self.qk_norm = None
        if attention.qk_norm:  # one norm with a weight for each head: (H + K, D)
            self.qk_norm = RMSNorm(self.head_dim, attention.q_norm.eps)
            weights = [attention.q_norm.weight] * self.heads + [
                attention.k_norm.weight
            ] * self.kv_heads
            self.qk_norm.weight = nn.Parameter(torch.stack(weights).detach())
        self.moe = mlp if isinstance(mlp, MoE) else None
        if not self.moe:
            self.gate_up = _joined([mlp.gate_proj, mlp.up_proj], dtype)
            self.down = _joined([mlp.down_proj], dtype)

    def __call__(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache
    ) -> Tensor:
        B, T, _ = x.shape
        qkv = linear(self.norms[0](x), self.qkv).view(B, T, -1, self.head_dim)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if self.qk_norm:
            qk = self.qk_norm(qk)
        qk = apply_rotary(qk, *rotary).transpose(1, 2)  # (B, H + K, T, D)
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        k, v = cache.append(self.index, k, v.transpose(1, 2))
        x = x + linear(attend(q, k, v, mask), self.out)
        if self.moe:
            return x + self.moe(self.norms[1](x))
        gate, up = linear(self.norms[1](x), self.gate_up).chunk(2, dim=-1)
        return x + linear(F.silu(gate) * up, self.down)


class Reader:
    """`reader(ids, positions, mask, cache) -> logits` of the last position, (B, V).

    Equals `model(ids, attention_mask, cache)[:, -1]`, computed in `dtype` as under autocast.
    """

    def __init__(self, model: MiniMind, dtype: torch.dtype) -> None:
        inner = model.model
        self.embedding, self.norm = inner.embed_tokens, inner.norm
        self.frequencies, self.rope_scale = inner.frequencies, inner.rope_scale
        self.layers = [_Layer(block, dtype) for block in inner.layers]
        self.head = _joined([model.lm_head], dtype)

    def __call__(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: KVCache
    ) -> Tensor:
        """Read T new tokens per row.

        Args:
            ids: (B, T); positions: (B or 1, T).
            mask: (B or 1, 1, T, S), True = may look; None as in `attend`.
        """
        logits = self.read(ids, positions, mask, cache)
        cache.length += ids.shape[1]
        return logits

    def read(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """The arithmetic of the call."""
        cos, sin = rotary_embedding(positions, self.frequencies, self.rope_scale)
        rotary = cos.transpose(1, 2), sin.transpose(1, 2)  # (B or 1, T, 1, D)
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, rotary, mask, cache)
        return linear(self.norm(x[:, -1]), self.head)


@cache
def compiled_read() -> Callable[..., Tensor]:
    """Return `Reader.read` compiled; every later Reader of the same shape uses the same code."""
    return torch.compile(Reader.read, dynamic=False)  # imported and compiled when first used
