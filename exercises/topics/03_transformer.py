"""Exercises 03: normalisation, counting parameters, the KV cache, experts, the residual stream."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from checks import Exercise, sentence
from torch import Tensor

TITLE = "Transformer"
PRACTISES = (
    "RMSNorm in every precision, knowing where the parameters are, generating with a KV cache, "
    "mixing SwiGLU experts, seeing what normalisation is for."
)


def numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# 1. RMSNorm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide every vector by its root mean square: x / √(mean(x²) + eps) · weight.

    Args:
        x: (B, T, C), of any floating dtype.
        weight: (C,), of the dtype of x.

    Returns:
        (B, T, C) in the dtype of x; the mean is taken in float32.
    """
    ### BEGIN SOLUTION
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)
    ### END SOLUTION


def rms_norm_cases(seed: int) -> list[tuple]:
    g = numbers(seed)
    cases = []
    for scale, dtype in [(1.0, torch.float32), (0.02, torch.float32), (400.0, torch.float16)]:
        x = torch.randn(2, 3, 5, generator=g) * scale + 0.5 * scale
        weight = torch.rand(5, generator=g) + 0.5
        cases.append((x.to(dtype), weight.to(dtype), 1e-3))
    return cases


def wide_mean_square(x):
    return x.float().pow(2).mean(-1, keepdim=True)


def mean_subtracted(x, weight, eps):
    """You also move the mean to zero; that is LayerNorm. RMSNorm only rescales."""
    wide = x.float() - x.float().mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(wide_mean_square(wide) + eps)).to(x.dtype)


def eps_outside(x, weight, eps):
    """Your eps is added to the root; it belongs to what is under it, where small vectors notice."""
    return weight * (x.float() / (wide_mean_square(x).sqrt() + eps)).to(x.dtype)


def eps_forgotten(x, weight, eps):
    """You leave eps out: a vector of zeros would become NaN."""
    return weight * (x.float() / wide_mean_square(x).sqrt()).to(x.dtype)


def sum_for_mean(x, weight, eps):
    """You divide by the length of the vector (the root of a sum), so results shrink as C grows."""
    square = x.float().pow(2).sum(-1, keepdim=True)
    return weight * (x.float() * torch.rsqrt(square + eps)).to(x.dtype)


def root_forgotten(x, weight, eps):
    """You divide by the mean square itself: doubling the input would halve the output."""
    return weight * (x.float() / (wide_mean_square(x) + eps)).to(x.dtype)


def over_time(x, weight, eps):
    """You average over the positions of the text; every position must be normalised on its own."""
    square = x.float().pow(2).mean(1, keepdim=True)
    return weight * (x.float() * torch.rsqrt(square + eps)).to(x.dtype)


def over_everything(x, weight, eps):
    """You use one number for the whole batch, so each row depends on all the others."""
    return weight * (x.float() * torch.rsqrt(x.float().pow(2).mean() + eps)).to(x.dtype)


def squared_in_half(x, weight, eps):
    """You square in half precision, and 400² no longer fits: float16 ends at 65504."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def stays_wide(x, weight, eps):
    """You hand back float32 for half-precision input, so everything after it runs in float32 too."""
    return weight.float() * (x.float() * torch.rsqrt(wide_mean_square(x) + eps))


def weight_forgotten(x, weight, eps):
    """The learned scale of each channel is missing."""
    return (x.float() * torch.rsqrt(wide_mean_square(x) + eps)).to(x.dtype)


RMS_NORM = Exercise(
    solution=rms_norm,
    cases=rms_norm_cases,
    title="RMSNorm",
    difficulty=1,
    importance=4,
    minutes=10,
    statement=r"""
$$\text{norm}(x) = \frac{x}{\sqrt{\frac{1}{C}\sum_c x_c^2 + \epsilon}} \cdot w$$

A short formula with room for ten mistakes. Mind the precision: models run in 16 bits, where a square
overflows soon and a mean of many numbers loses digits. So widen, compute, and come back.
""",
    hints=[
        "Over which of the axes B, T, C is the mean, and what is its shape if it is to be divided by?",
        "`keepdim=True` keeps the axis so that it broadcasts. `x.float()` widens.",
        "`torch.rsqrt` is one over the root; eps goes inside. Narrow with `.to(x.dtype)` at the end.",
    ],
    mistakes=[mean_subtracted, eps_outside, eps_forgotten, sum_for_mean, root_forgotten, over_time,
              over_everything, squared_in_half, stays_wide, weight_forgotten],
    discussion="(Zhang and Sennrich, arXiv 1910.07467, eq. 4.) `minimind.model.RMSNorm` is this.",
)  # fmt: skip


# 2. Where the parameters are


def count_parameters(config: dict) -> int:
    """Return how many numbers a Llama-style model learns.

    Args:
        config: the integers vocab_size (V), hidden_size (C), num_hidden_layers (L),
            num_attention_heads (H), num_key_value_heads (K), head_dim (D), intermediate_size (I),
            and the bools tie_word_embeddings and qk_norm.
    """
    ### BEGIN SOLUTION
    V, C, D = config["vocab_size"], config["hidden_size"], config["head_dim"]
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    attention = C * H * D + 2 * C * K * D + H * D * C  # q; k and v; o
    if config["qk_norm"]:
        attention += 2 * D
    feed_forward = 3 * C * config["intermediate_size"]  # gate, up, down
    block = attention + feed_forward + 2 * C  # two norms
    embeddings = V * C * (1 if config["tie_word_embeddings"] else 2)
    return embeddings + config["num_hidden_layers"] * block + C  # and the final norm
    ### END SOLUTION


FIELDS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "intermediate_size", "tie_word_embeddings",
          "qk_norm")  # fmt: skip


def count_parameters_cases(seed: int) -> list[tuple]:
    rows = [
        (6400, 512, 8, 8, 2, 64, 1408, True, False),  # the course's full model
        (1000 + seed, 96, 3, 4, 2, 32, 256, True, True),  # H·D is not C
        (1000 + seed, 96, 3, 6, 3, 16, 256, False, False),
    ]
    return [(dict(zip(FIELDS, row)),) for row in rows]


def count_with(config, **other):
    return count_parameters({**config, **other})


def head_counted_twice(config):
    """You count the output layer although it is tied: embedding and output share one matrix."""
    return count_with(config, tie_word_embeddings=False)


def head_never_counted(config):
    """An output layer that is not tied has a matrix of its own."""
    return count_with(config, tie_word_embeddings=True)


def all_heads_have_keys(config):
    """You give every query head keys and values of its own; grouped heads share them."""
    return count_with(config, num_key_value_heads=config["num_attention_heads"])


def two_matrices(config):
    """Your feed-forward has two matrices. SwiGLU multiplies two projections before it comes back."""
    C, inner, L = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    return count_parameters(config) - L * C * inner


def square_projections(config):
    """You take the heads together to be as wide as the model; here H·D and C are different
    numbers."""
    return count_with(config, head_dim=config["hidden_size"] // config["num_attention_heads"])


def final_norm_forgotten(config):
    """You are short of exactly one vector: something stands between the last block and the output."""
    return count_parameters(config) - config["hidden_size"]


def block_norms_forgotten(config):
    """Every block has two parts, and in front of each part stands something small that is learned."""
    return count_parameters(config) - 2 * config["hidden_size"] * config["num_hidden_layers"]


def qk_norm_per_head(config):
    """Queries and keys are normalised with one vector of size D each, shared by all heads."""
    heads = config["num_attention_heads"] + config["num_key_value_heads"]
    extra = config["num_hidden_layers"] * config["head_dim"] * (heads - 2)
    return count_parameters(config) + extra * config["qk_norm"]


def qk_norm_ignored(config):
    """With `qk_norm`, queries and keys bring two small vectors into every block."""
    return count_with(config, qk_norm=False)


def with_biases(config):
    """You count biases. Llama-style models have none."""
    C, D = config["hidden_size"], config["head_dim"]
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    per_block = H * D + 2 * K * D + C + 2 * config["intermediate_size"] + C
    return count_parameters(config) + config["num_hidden_layers"] * per_block


COUNT_PARAMETERS = Exercise(
    solution=count_parameters,
    cases=count_parameters_cases,
    title="Where are the parameters?",
    difficulty=2,
    importance=4,
    minutes=15,
    statement="""
Whoever can count a model's parameters has understood its parts. Count a Llama-style model from its
config alone, without building it: embedding, L blocks (norm, grouped attention, norm, SwiGLU
feed-forward), final norm, output layer. No biases. With `qk_norm`, RMSNorms of size D stand on the
queries and on the keys of each block.

**Guess first:** in a model with V = 6400, C = 512, L = 8 and I = 1408, is most of it in the
embedding, in the attention or in the feed-forward?
""",
    hints=[
        "Make a list of the matrices, each with its two sides, then of the vectors.",
        "Attention has four matrices: two with H·D columns or rows, two with K·D. SwiGLU has three.",
        "Vectors: two norms of size C per block, one at the end; with `qk_norm` two of size D per block.",
    ],
    mistakes=[head_counted_twice, head_never_counted, all_heads_have_keys, two_matrices,
              square_projections, final_norm_forgotten, block_norms_forgotten, qk_norm_per_head,
              qk_norm_ignored, with_biases],
    discussion="25,829,888 for the full model: 67% feed-forward, 20% attention, 13% embedding.",
)  # fmt: skip


# 3. The KV cache


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: tuple[Tensor, Tensor],
    rotate: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Causal attention of T new positions to everything so far.

    Args:
        q, k, v: (B, H, T, D) of the new positions, not yet rotated.
        past: keys and values (B, H, S, D) of the S positions before, keys already rotated.
        rotate: (x (B, H, T, D), positions (T,)) to the rotated x.

    Returns:
        The result (B, H, T, D), and keys and values (B, H, S + T, D) for the next call.
    """
    ### BEGIN SOLUTION
    S, T, D = past[0].shape[2], q.shape[2], q.shape[3]
    positions = torch.arange(S, S + T)
    q, k = rotate(q, positions), rotate(k, positions)
    k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    ahead = torch.arange(S + T) > positions[:, None]  # (T, S + T)
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)
    y = scores.masked_fill(ahead, float("-inf")).softmax(-1) @ v
    return y, (k, v)
    ### END SOLUTION


def cached_attention_cases(seed: int) -> list[tuple]:
    g = numbers(seed)
    cases = []
    for chunks in ([6], [1, 1, 1, 1, 1, 1], [3, 1, 2]):  # at once, one by one, in pieces
        q, k, v = (torch.randn(2, 3, 6, 4, generator=g) for _ in range(3))
        cases.append((q, k, v, chunks))
    return cases


def rope(x: Tensor, positions: Tensor) -> Tensor:
    D = x.shape[-1]
    angles = positions[:, None] * 100.0 ** -(torch.arange(0, D, 2) / D)
    a, b = x.chunk(2, dim=-1)
    return torch.cat(
        [a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1
    )


def run_in_chunks(function, q, k, v, chunks):
    """Feed a text piece by piece; together the pieces must give what one full pass gives."""
    B, H, _, D = q.shape
    past = torch.zeros(B, H, 0, D), torch.zeros(B, H, 0, D)
    results = []
    for new in zip(*(x.split(chunks, dim=2) for x in (q, k, v))):
        y, past = function(*new, past, rope)
        results.append(y)
    return {"result": torch.cat(results, dim=2), "keys": past[0], "values": past[1]}


def attend_to_past(q, k, v, S):
    T = q.shape[2]
    ahead = torch.arange(k.shape[2]) > torch.arange(S, S + T)[:, None]
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v


def after(past, new):
    return torch.cat([past, new], dim=2)


def positions_start_anew(q, k, v, past, rotate):
    """Every call starts at position 0, so the new tokens believe that they open the text."""
    positions = torch.arange(q.shape[2])
    q, k = rotate(q, positions), rotate(k, positions)
    k, v = after(past[0], k), after(past[1], v)
    return attend_to_past(q, k, v, past[0].shape[2]), (k, v)


def keys_rotated_again(q, k, v, past, rotate):
    """Keys from the cache are turned once more at every call; they were turned when they were new."""
    S, T = past[0].shape[2], q.shape[2]
    q = rotate(q, torch.arange(S, S + T))
    k, v = rotate(after(past[0], k), torch.arange(S + T)), after(past[1], v)
    return attend_to_past(q, k, v, S), (k, v)


def key_not_rotated(q, k, v, past, rotate):
    """The queries know where they stand, the new keys do not."""
    S, T = past[0].shape[2], q.shape[2]
    q = rotate(q, torch.arange(S, S + T))
    k, v = after(past[0], k), after(past[1], v)
    return attend_to_past(q, k, v, S), (k, v)


def mask_from_the_corner(q, k, v, past, rotate):
    """Your causal mask starts in the upper left corner, so a new token sees the start of the text
    and little else."""
    S, T = past[0].shape[2], q.shape[2]
    q, k = (rotate(x, torch.arange(S, S + T)) for x in (q, k))
    k, v = after(past[0], k), after(past[1], v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True), (k, v)


def chunk_sees_itself(q, k, v, past, rotate):
    """One token at a time is fine, but several new tokens also see each other's future."""
    S, T = past[0].shape[2], q.shape[2]
    q, k = (rotate(x, torch.arange(S, S + T)) for x in (q, k))
    k, v = after(past[0], k), after(past[1], v)
    return F.scaled_dot_product_attention(q, k, v), (k, v)


def not_remembered(q, k, v, past, rotate):
    """You attend to the new keys and then do not hand them on: the next call has forgotten them."""
    S, T = past[0].shape[2], q.shape[2]
    q, k = (rotate(x, torch.arange(S, S + T)) for x in (q, k))
    return attend_to_past(q, after(past[0], k), after(past[1], v), S), past


def past_not_used(q, k, v, past, rotate):
    """You keep the cache and do not look into it: the new tokens see only each other."""
    S, T = past[0].shape[2], q.shape[2]
    q, k = (rotate(x, torch.arange(S, S + T)) for x in (q, k))
    return attend_to_past(q, k, v, 0), (after(past[0], k), after(past[1], v))


def put_in_front(q, k, v, past, rotate):
    """You put the newest in front of the cache; attention does not mind, but masks and later code
    count on the order."""
    S, T = past[0].shape[2], q.shape[2]
    q, k = (rotate(x, torch.arange(S, S + T)) for x in (q, k))
    k, v = after(k, past[0]), after(v, past[1])
    order = torch.cat([torch.arange(S, S + T), torch.arange(S)])
    ahead = order > torch.arange(S, S + T)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~ahead), (k, v)


CACHED_ATTENTION = Exercise(
    solution=cached_attention,
    cases=cached_attention_cases,
    run=run_in_chunks,
    title="Attention with a memory",
    difficulty=4,
    importance=5,
    minutes=25,
    statement="""
To write token number 1,000, a model needs the keys and values of the 999 before it. They never change,
so it keeps them. Write attention for T new positions after S old ones; the check feeds one text whole,
token by token, and in pieces, and all three must give the numbers of the full pass.

Positions go on counting. Old keys come rotated from the cache. And among the new positions the causal
mask still holds: with S old and T new ones it has T rows and S + T columns.
""",
    hints=[
        "Draw the mask for S = 3, T = 2: two rows, five columns. Which corner is empty?",
        "Query number t stands at position S + t and may see every key whose position is not greater.",
        "Rotate only what is new, at `torch.arange(S, S + T)`; concatenate on the time axis; compare "
        "key positions with query positions to get the mask.",
    ],
    mistakes=[positions_start_anew, keys_rotated_again, key_not_rotated, mask_from_the_corner,
              chunk_sees_itself, not_remembered, past_not_used, put_in_front],
    discussion="`F.scaled_dot_product_attention(..., is_causal=True)` puts its mask into the upper left "
    "corner. That is right without a cache and wrong with one, and it raises no error.",
)  # fmt: skip


# 4. A mixture of SwiGLU experts


def mixture(
    x: Tensor, router: Tensor, experts: list[tuple[Tensor, Tensor, Tensor]], k: int
) -> Tensor:
    """Send every token to its k best experts and mix what they return.

    Args:
        x: (N, C) tokens.
        router: (E, C); the scores of a token are x·routerᵀ.
        experts: E triples of weights gate (I, C), up (I, C), down (C, I). An expert computes
            down·(silu(gate·x) ∗ up·x).

    Returns:
        (N, C): the sum over the k chosen experts of weight · result. The weights are the softmax of
        the scores, kept for the k largest and scaled so that they sum to 1.
    """
    ### BEGIN SOLUTION
    weights, chosen = (x @ router.T).softmax(-1).topk(k, dim=-1)  # both (N, k)
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for index, (gate, up, down) in enumerate(experts):
        result = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
        y += (weights * (chosen == index)).sum(-1, keepdim=True) * result
    return y
    ### END SOLUTION


def mixture_cases(seed: int) -> list[tuple]:
    g = numbers(seed)
    cases = []
    for N, C, E, inner, k in [(5, 4, 3, 6, 2), (7, 6, 4, 5, 1), (6, 4, 5, 3, 3)]:
        shapes = [(inner, C), (inner, C), (C, inner)]
        experts = [tuple(torch.randn(s, generator=g) for s in shapes) for _ in range(E)]
        x, router = torch.randn(N, C, generator=g), torch.randn(E, C, generator=g)
        cases.append((x, router, experts, k))
    return cases


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def mix(x, experts, weights, expert=swiglu):
    """Sum the experts with dense weights (N, E)."""
    return sum(weights[:, i, None] * expert(x, *experts[i]) for i in range(len(experts)))


def kept(x, router, k):
    """Softmax with all but the k largest set to zero: (N, E)."""
    p = (x @ router.T).softmax(-1)
    return torch.zeros_like(p).scatter(-1, p.topk(k).indices, p.topk(k).values)


def to_one(weights):
    return weights / weights.sum(-1, keepdim=True)


def not_renormalised(x, router, experts, k):
    """The weights of the chosen experts do not sum to one, so a token fades when the router is
    unsure."""
    return mix(x, experts, kept(x, router, k))


def all_experts_used(x, router, experts, k):
    """Every token visits every expert; choosing a few is what makes a mixture cheap."""
    return mix(x, experts, (x @ router.T).softmax(-1))


def softmax_over_tokens(x, router, experts, k):
    """Your tokens compete for the experts; in this router each token chooses for itself."""
    p = (x @ router.T).softmax(0)
    return mix(
        x, experts, to_one(torch.zeros_like(p).scatter(-1, p.topk(k).indices, p.topk(k).values))
    )


def ranks_for_experts(x, router, experts, k):
    """Your best weight always goes to expert 0: topk returns ranks, and who holds a rank stands in
    its indices."""
    weights = (x @ router.T).softmax(-1).topk(k).values
    return mix(x, experts[:k], to_one(weights))


def equal_weights(x, router, experts, k):
    """All chosen experts count alike; the router's opinion, and with it its gradient, is lost."""
    return mix(x, experts, (kept(x, router, k) > 0).float() / k)


def hidden_with_zero(x, router, experts, k):
    """Scores that were not chosen become zero before your softmax, and exp(0) is 1."""
    scores = x @ router.T
    top = scores.topk(k)
    return mix(
        x, experts, torch.zeros_like(scores).scatter(-1, top.indices, top.values).softmax(-1)
    )


def raw_scores(x, router, experts, k):
    """You mix with raw scores; they can be negative, and no softmax has made shares of them."""
    top = (x @ router.T).topk(k)
    weights = torch.zeros(len(x), len(router)).scatter(-1, top.indices, top.values)
    return mix(x, experts, weights)


def silu_on_up(x, router, experts, k):
    """Your experts bend the wrong branch: the gate goes through silu, the other stays as it is."""
    swapped = [(up, gate, down) for gate, up, down in experts]
    return mix(x, swapped, to_one(kept(x, router, k)))


def silu_after_product(x, router, experts, k):
    """Your experts multiply first and bend afterwards; the gate is bent before it multiplies."""
    return mix(x, experts, to_one(kept(x, router, k)),
               lambda x, gate, up, down: F.silu((x @ gate.T) * (x @ up.T)) @ down.T)  # fmt: skip


def sigmoid_for_silu(x, router, experts, k):
    """Your gate is a sigmoid (that is GLU); silu(z) is z times that."""
    return mix(x, experts, to_one(kept(x, router, k)),
               lambda x, gate, up, down: (torch.sigmoid(x @ gate.T) * (x @ up.T)) @ down.T)  # fmt: skip


MIXTURE = Exercise(
    solution=mixture,
    cases=mixture_cases,
    title="A mixture of experts",
    difficulty=4,
    importance=3,
    minutes=25,
    statement="""
A mixture of experts has many feed-forwards and uses few: a router scores them for every token, the k
best compute, their results are mixed. Each expert is a SwiGLU, `down(silu(gate(x)) * up(x))`.

Clarity before speed: you may compute every expert on all tokens and multiply by zero where it was not
chosen. (What would a fast version do instead?)
""",
    hints=[
        "Two separate things: an (N, E) table of weights that is mostly zero, and a sum over experts.",
        "`values, indices = p.topk(k, dim=-1)` are both (N, k). `indices` says **which** experts.",
        "`chosen == index` is True where expert `index` holds a rank; times the weights, summed over "
        "the ranks, it gives that expert's weight for every token.",
    ],
    mistakes=[not_renormalised, all_experts_used, softmax_over_tokens, ranks_for_experts,
              equal_weights, hidden_with_zero, raw_scores, silu_on_up, silu_after_product,
              sigmoid_for_silu],
    discussion="A softmax over the k chosen scores alone gives the same weights; see why? A fast version "
    "gathers each expert's tokens first, as `minimind.model.MoE` does. (Shazeer, arXiv 2002.05202.)",
)  # fmt: skip


# 5. Open-ended: what the norm is for


def residual_growth(width: int, depth: int, norm: bool) -> list[float]:
    """Return the root mean square of the residual stream before the first layer and after each.

    Start from x ~ N(0, 1) of shape (64, width). Each of `depth` layers has a fresh random matrix W
    with entries N(0, 1/width) and does x = x + W·f(x), where f normalises (root mean square 1 per
    row, no weight) if `norm`, and else leaves x alone.

    Returns:
        depth + 1 numbers.
    """
    ### BEGIN SOLUTION
    x = torch.randn(64, width)
    sizes = [x.pow(2).mean().sqrt().item()]
    for _ in range(depth):
        W = torch.randn(width, width) / math.sqrt(width)
        read = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) if norm else x
        x = x + read @ W.T
        sizes.append(x.pow(2).mean().sqrt().item())
    return sizes
    ### END SOLUTION


def residual_growth_cases(seed: int) -> list[tuple]:
    return [(192, 16 + seed, True), (192, 16 + seed, False)]


def judge_residual_growth(cases: list[tuple], results: list[list[float]]) -> str | None:
    depth = cases[0][1]
    with_norm, without = results
    for sizes in results:
        if len(sizes) != depth + 1:
            return f"{depth} layers leave {depth + 1} measurements, the start included; not {len(sizes)}."
    if not all(0.9 < sizes[0] < 1.1 for sizes in results):
        return "Before the first layer the root mean square of N(0, 1) is 1; yours is not."
    slow, fast = with_norm[-1] / math.sqrt(1 + depth), math.log2(without[-1]) / (depth / 2)
    if with_norm[-1] < 1.5 and abs(fast) < 0.3:
        return sentence(nothing_added)
    if with_norm[-1] < 1.5:
        return sentence(norm_after_sum)
    if with_norm[-1] > 0.8 * 2 ** (depth / 2):
        return sentence(norm_ignored)
    if abs(fast - 1) > 0.15:
        return (
            f"Without a norm each layer should add as much variance as there is; after {depth} layers "
            f"that is a size near {2 ** (depth / 2):.0f}. Yours is {without[-1]:.4g}."
        )
    if abs(slow - 1) > 0.15:
        return (
            f"With a norm each layer should add a variance of 1; after {depth} layers that is a size "
            f"near {math.sqrt(1 + depth):.2f}. Yours is {with_norm[-1]:.4g}."
        )
    return None


def normalised(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))


def grow(width, depth, layer, fresh=True, spread=None):
    x = torch.randn(64, width)
    sizes = [x.pow(2).mean().sqrt().item()]
    for i in range(depth):
        if fresh or i == 0:
            W = torch.randn(width, width) * (spread or 1 / math.sqrt(width))
        x = layer(x, W)
        sizes.append(x.pow(2).mean().sqrt().item())
    return sizes


def nothing_added(width, depth, norm):
    """Nothing grows because nothing is added: without `x +` each layer replaces the stream."""
    return grow(width, depth, lambda x, W: (normalised(x) if norm else x) @ W.T)


def norm_after_sum(width, depth, norm):
    """You normalise the stream itself (post-norm). Pre-norm touches only the copy that a layer
    reads."""
    return grow(width, depth, lambda x, W: normalised(x + x @ W.T) if norm else x + x @ W.T)


def norm_ignored(width, depth, norm):
    """With and without the norm your stream explodes alike: what the layer reads is not
    normalised."""
    return grow(width, depth, lambda x, W: x + x @ W.T)


def one_matrix_for_all(width, depth, norm):
    """All layers share one matrix, so each pushes in the direction of the last; take a fresh one
    every time."""
    return grow(width, depth, lambda x, W: x + (normalised(x) if norm else x) @ W.T, fresh=False)


def entries_too_large(width, depth, norm):
    """Your matrix entries have variance 1, so a single layer makes everything √width times larger."""
    return grow(width, depth, lambda x, W: x + (normalised(x) if norm else x) @ W.T, spread=1.0)


RESIDUAL_GROWTH = Exercise(
    solution=residual_growth,
    cases=residual_growth_cases,
    judge=judge_residual_growth,
    title="What is the norm for? (open-ended)",
    difficulty=3,
    importance=4,
    minutes=25,
    statement="""
Every layer reads the residual stream, computes something, and adds it. How large does the stream get
in 8 layers, in 80? Measure it on random layers, once with a norm in front of what each layer reads
(pre-norm) and once without.

**Predict first**, on paper: if a layer adds something of the stream's own size in a random direction,
by what factor does the size grow? And if what it adds always has size 1?

Then play. Plot both curves for depth 80, on a logarithmic axis. Where would float16 end? Scale what
each layer adds by 1/√(2·depth), as GPT-2's initialisation does: what is left of the difference?
""",
    hints=[
        "Variances of independent things add. What is the variance after one layer, after two?",
        "The norm goes on the copy: `x + W·norm(x)`, not `norm(x + W·x)`.",
    ],
    mistakes=[nothing_added, norm_after_sum, norm_ignored, one_matrix_for_all, entries_too_large],
    discussion="""
Without a norm the variance doubles with every layer, so the size grows like 2^(depth/2): after 32
layers it passes 65,504, and float16 is over. With pre-norm each layer adds 1, and the size is only
√(1 + depth). The price: late layers change the stream less and less, relative to its size.
""",
)

EXERCISES = [RMS_NORM, COUNT_PARAMETERS, CACHED_ATTENTION, MIXTURE, RESIDUAL_GROWTH]
