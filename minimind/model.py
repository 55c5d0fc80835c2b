"""The model: a decoder-only transformer in the Llama family, from nothing but PyTorch.

Reads top to bottom: RMSNorm, rotary positions, KV cache, attention, feed-forward, mixture of
experts, block, model. Parameter names are Hugging Face's, so weights move both ways unchanged.

Letters used in every comment: B batch, T new tokens, S tokens seen so far (cache included),
H query heads, K key/value heads, D size of a head, C hidden size, V vocabulary.

Left out on purpose: biases, learned positions, sliding windows, tensor parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minimind.config import ModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (arXiv 1910.07467, eq. 4).

    The mean is taken in float32 whatever the input's dtype, and the output keeps that dtype.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Return (radians per position of each pair (D/2,), factor on cos and sin).

    Pair i turns by theta^(-2i/D) per position (RoPE, arXiv 2104.09864, eq. 15). With YaRN
    (arXiv 2309.00071, eqs. 17-22) slow pairs, which never made a full turn in training, are
    slowed down by `factor`; fast ones stay; a ramp joins the two.
    """
    size, theta = config.head_dim, config.rope_theta
    frequencies = 1 / theta ** (torch.arange(0, size, 2).float() / size)
    scaling = config.rope_scaling
    if not scaling:
        return frequencies, 1.0

    factor, trained = scaling["factor"], scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return size * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(pair_that_turns(scaling.get("beta_slow", 1))), size - 1)
    ramp = ((torch.arange(size // 2).float() - low) / max(high - low, 1e-3)).clamp(0, 1)
    scale = scaling.get("attention_factor", 0.1 * math.log(factor) + 1)
    return frequencies * (1 - ramp) + frequencies / factor * ramp, scale


def rotary_embedding(
    positions: Tensor, frequencies: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (B or 1, 1, T, D), for positions (B or 1, T)."""
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, D/2)
    angles = torch.cat([angles, angles], dim=-1)  # half-split: pair i is (i, i + D/2)
    return angles.cos() * scale, angles.sin() * scale


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair (x_i, x_{i+D/2}) of x (B, H, T, D) by its angle."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class KVCache:
    """Keys and values of everything seen so far, in memory allocated once.

    `keys` and `values` are (layers, B, K, capacity, D); `length` positions are filled. With
    `place` (a tensor with the next position) the shapes of all steps are the same, as compiled code
    wants it: the whole capacity is returned, and a mask must hide what is not filled.
    """

    place: Tensor | None = None

    def __init__(self, config: ModelConfig, batch: int, capacity: int, like: Tensor) -> None:
        c = config
        shape = (c.num_hidden_layers, batch, c.num_key_value_heads, capacity, c.head_dim)
        device, dtype = like.device.type, like.dtype
        if device != "cpu" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)  # what autocast's keys and values are
        self.keys, self.values = like.new_zeros(2, *shape, dtype=dtype)
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new keys and values (B, K, T, D); return all S of them (B, K, S, D)."""
        if self.place is not None:
            keys, values = self.keys[layer], self.values[layer]
            keys.index_copy_(2, self.place, key.to(keys.dtype))
            values.index_copy_(2, self.place, value.to(values.dtype))
            return keys, values
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def repeat_rows(self, copies: int) -> None:
        """Put `copies` of every row of the batch in its place."""
        self.keys = self.keys.repeat_interleave(copies, dim=1)
        self.values = self.values.repeat_interleave(copies, dim=1)

    def drop_rows(self, gone: Tensor) -> Tensor:
        """Forget the rows `gone` (indices); rows from the end move into their places.

        So no row but those is copied. Returns which old row stands in each place now.
        """
        B = self.keys.shape[1]
        left = B - len(gone)
        stays = torch.ones(B, dtype=torch.bool, device=gone.device).index_fill_(0, gone, False)
        holes = gone[gone < left]
        movers = left + stays[left:].nonzero()[:, 0]
        for store in (self.keys, self.values):
            store[:, holes, :, : self.length] = store[:, movers, :, : self.length]
        self.keys, self.values = self.keys[:, :left], self.values[:, :left]
        order = torch.arange(left, device=gone.device)
        order[holes] = movers
        return order


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads.

    softmax(q·kᵀ/√D + mask)·v (arXiv 1706.03762, eq. 1); H query heads share K key/value heads
    (GQA, arXiv 2305.13245). With `qk_norm`, queries and keys are RMS-normed first, as in Qwen3.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.dropout = layer, config.head_dim, config.dropout
        hidden, heads, kv_heads = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = apply_rotary(q.transpose(1, 2), *rotary)  # (B, H, T, D)
        k = apply_rotary(k.transpose(1, 2), *rotary)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.o_proj(y)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """softmax(q·kᵀ/√D + mask)·v, query heads in groups that share a key head: (B, T, H·D).

    Args:
        q: (B, H, T, D); k, v: (B, K, S, D).
        mask: (B or 1, 1, T, S), True = may look; None: causal, or all of S if T is 1.
    """
    (B, H, T, D), K, dtype = q.shape, k.shape[1], v.dtype
    if T == 1:  # the heads of a group take the place of T: no key is copied
        q, causal = q.reshape(B, K, H // K, D).contiguous(), False
    else:
        causal = mask is None
        k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
    # In bfloat16 the CPU kernel is up to 3 times slower on rows of 128 tokens and fewer.
    wanted = torch.float32 if q.device.type == "cpu" and T < 512 else dtype
    q, k, v = q.to(wanted), k.to(wanted), v.to(wanted)
    with torch.autocast(q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout
        ).to(dtype)
    return y.reshape(B, H, T, D).transpose(1, 2).reshape(B, T, H * D)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (arXiv 2002.05202, eq. 6)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """A router sends every token to its k best experts and mixes their outputs.

    After each forward `aux_loss` holds the load-balancing loss E·Σₑ fₑ·Pₑ of the Switch
    Transformer (arXiv 2101.03961, eqs. 4-6): fₑ is the number of tokens expert e received over
    the number of tokens, Pₑ its mean probability. It is k when all experts are used alike.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            FeedForward(config.hidden_size, config.moe_intermediate_size)
            for _ in range(config.num_experts)
        )
        self.aux_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # (B·T, C)
        probabilities = self.gate(tokens).float().softmax(-1)  # (B·T, E)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)  # (B·T, k)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        self.aux_loss = self._balance(probabilities, chosen)
        y = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, slots = (chosen == index).nonzero(as_tuple=True)
            out = expert(tokens[rows]) * weights[rows, slots, None].to(tokens.dtype)
            y = y.index_add(0, rows, out.to(y.dtype))
        return y.view_as(x)

    def _balance(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        experts = probabilities.shape[-1]
        received = F.one_hot(chosen, experts).float().sum(1).mean(0)  # (E,)
        return experts * (received * probabilities.mean(0)).sum()


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)): a pre-norm residual block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = config.hidden_size, config.intermediate_size
        self.mlp = MoE(config) if config.use_moe else FeedForward(*dense)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotary, mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Transformer(nn.Module):
    """Token embedding, blocks, final norm: token ids (B, T) to hidden states (B, T, C).

    With `gradient_checkpointing` a block keeps its input alone for the backward pass, and is
    computed again there (arXiv 1604.06174): a third more arithmetic, the same gradients.
    """

    gradient_checkpointing = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        frequencies, self.rope_scale = rope_frequencies(config)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        past = cache.length if cache is not None else 0
        positions, mask = positions_and_mask(input_ids, attention_mask, past)
        rotary = rotary_embedding(positions, self.frequencies, self.rope_scale)
        x = self.dropout(self.embed_tokens(input_ids))
        again = self.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        for layer in self.layers:
            if again:
                x = checkpoint(layer, x, rotary, mask, cache, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, cache)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm(x)


def positions_and_mask(
    input_ids: Tensor, attention_mask: Tensor | None, past: int
) -> tuple[Tensor, Tensor | None]:
    """Return positions (B or 1, T) and the attention mask (B or 1, 1, T, S), True = may look.

    Without padding and without a cache no mask is needed: None stands for "causal", which the
    attention kernel does without a mask in memory. Padding on the left does not count as a
    position: the first real token of every row is at 0. A padded query looks at itself alone,
    since a softmax over nothing would be NaN.
    """
    T, S = input_ids.shape[1], past + input_ids.shape[1]
    queries = torch.arange(past, S, device=input_ids.device)
    if attention_mask is None:
        if past == 0 or T == 1:
            return queries[None], None
        keys = torch.arange(S, device=input_ids.device)
        return queries[None], (keys <= queries[:, None])[None, None]
    real = attention_mask.bool()  # (B, S)
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
    keys = torch.arange(S, device=input_ids.device)
    causal = keys <= queries[:, None]  # (T, S)
    itself = keys == queries[:, None]
    return positions, (causal & real[:, None] | itself)[:, None]


class MiniMind(nn.Module):
    """The language model: `model(input_ids) -> logits` (B, T, V).

    Args of the call:
        input_ids: (B, T) token ids.
        attention_mask: (B, S), 1 for real tokens and 0 for padding (left or right).
        cache: a KVCache; then `input_ids` are the new tokens only and S counts the old ones too.
        read: what to return instead of all logits, computed from the hidden states (B, T, C) and
            the output projection, such as `label_logps`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        std = 0.02 * math.sqrt(
            512 / config.hidden_size
        )  # Llama's 0.02 at its width, more if narrower
        self.apply(partial(_initialise, std=std))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None,
        read: Callable[[Tensor, nn.Linear], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        hidden = self.model(input_ids, attention_mask, cache)
        return read(hidden, self.lm_head) if read else self.lm_head(hidden)

    @property
    def router_loss(self) -> Tensor | float:
        """The load-balancing loss of the last forward, mean over layers; 0.0 without experts."""
        losses = [m.aux_loss for m in self.modules() if isinstance(m, MoE)]
        return self.config.router_aux_loss_coef * torch.stack(losses).mean() if losses else 0.0

    @property
    def num_parameters(self) -> int:
        """Number of trained numbers, tied weights counted once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device


def _initialise(module: nn.Module, std: float) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
