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
    attend,
    rotary_embedding,
)

# Not public, so never relied on: without them F.linear does the same, slower.
ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x·Wᵀ in the dtype of the weight, which may be in oneDNN's layout; without gradients."""
    x = x.to(weight.dtype)
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def joined(modules: list[nn.Module], dtype: torch.dtype, rows: int) -> Tensor:
    """Stack the weights of several projections, laid out for products with `rows` rows if that helps.

    An adapter's update is added to its weight.
    """
    merged = [m.merged() if hasattr(m, "merged") else m for m in modules]
    weight = torch.cat([m.weight.detach() for m in merged]).to(dtype)
    if rows and ONEDNN and dtype == torch.float32 and weight.device.type == "cpu":
        return torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return weight


def turn(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """`apply_rotary` in three operations: the minus of -x_{i+D/2} is in the sine."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, -1), signed_sin.to(x.dtype))


class _Norm:
    """RMSNorm in four operations: √(sum(x²) + n·eps) is the hypotenuse of ‖x‖ and √(n·eps)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        n = weight.shape[-1]
        self.gain, self.floor = weight.detach() * n**0.5, weight.new_tensor((n * eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / torch.hypot(length, self.floor)).to(x.dtype) * self.gain


class _Layer:
    """One block with q, k, v joined, and gate and up."""

    def __init__(self, block: Block, dtype: torch.dtype, rows: int) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.index, self.head_dim = attention.layer, attention.head_dim
        eps = block.input_layernorm.eps
        self.norm_1 = _Norm(block.input_layernorm.weight, eps)
        self.norm_2 = _Norm(block.post_attention_layernorm.weight, eps)
        self.qkv = joined([attention.q_proj, attention.k_proj, attention.v_proj], dtype, rows)
        self.out = joined([attention.o_proj], dtype, rows)
        self.heads = attention.q_proj.weight.shape[0] // self.head_dim
        self.kv_heads = attention.k_proj.weight.shape[0] // self.head_dim
        self.qk_norm = None
        if attention.qk_norm:  # a weight for each head: (H + K, D)
            q, k = attention.q_norm.weight, attention.k_norm.weight
            both = torch.cat([q.expand(self.heads, -1), k.expand(self.kv_heads, -1)])
            self.qk_norm = _Norm(both, eps)
        self.moe = mlp if isinstance(mlp, MoE) else None
        if not self.moe:
            self.gate_up = joined([mlp.gate_proj, mlp.up_proj], dtype, rows)
            self.down = joined([mlp.down_proj], dtype, rows)

    def __call__(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache
    ) -> Tensor:
        B, T, _ = x.shape
        qkv = linear(self.norm_1(x), self.qkv).view(B, T, -1, self.head_dim)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        qk = turn(qk, *rotary).transpose(1, 2)  # (B, H + K, T, D)
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        k, v = cache.append(self.index, k, v.transpose(1, 2))
        x = x + linear(attend(q, k, v, mask), self.out)
        normed = self.norm_2(x)
        if self.moe:
            return x + self.moe(normed)
        gate, up = linear(normed, self.gate_up).chunk(2, dim=-1)
        return x + linear(F.silu(gate) * up, self.down)


class Reader:
    """`reader(ids, positions, mask, cache) -> logits` of the last position, (B, V).

    Equals `model(ids, attention_mask, cache)[:, -1]`, computed in `dtype` as under autocast. `rows`
    is the usual number of rows, to lay out the weights for; 0 leaves them as they are (compiling).
    """

    def __init__(self, model: MiniMind, dtype: torch.dtype, rows: int = 0) -> None:
        inner = model.model
        self.embedding, self.norm = inner.embed_tokens, _Norm(inner.norm.weight, inner.norm.eps)
        self.frequencies, self.rope_scale = inner.frequencies, inner.rope_scale
        ones = torch.ones_like(self.frequencies)
        self.signs = torch.cat([-ones, ones])  # of sin in (-x_{i+D/2}, x_i)
        self.layers = [_Layer(block, dtype, rows) for block in inner.layers]
        self.head = joined([model.lm_head], dtype, rows)

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
        rotary = cos.transpose(1, 2), (sin * self.signs).transpose(1, 2)  # (B or 1, T, 1, D)
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, rotary, mask, cache)
        return linear(self.norm(x[:, -1]), self.head)


@cache
def compiled_read() -> Callable[..., Tensor]:
    """Return `Reader.read` compiled; every later Reader of the same shape uses the same code."""
    return torch.compile(Reader.read, dynamic=False)  # imported and compiled when first used
