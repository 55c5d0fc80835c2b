"""Exercises 02: causal attention, rotary positions, grouped heads, left padding, induction."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from checks import Exercise, sentence
from torch import Tensor

TITLE = "Attention"
PRACTISES = (
    "masked attention from nothing, rotary positions, sharing key and value heads, batching prompts "
    "of unequal length, building a copying circuit by hand."
)


def numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# 1. Causal attention


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention in which no position looks ahead.

    Args:
        q, k: (B, H, T, D) queries and keys.
        v: (B, H, T, E) values.

    Returns:
        (B, H, T, E): softmax(q·kᵀ/√D)·v, the softmax over the keys at or before the query.
    """
    ### BEGIN SOLUTION
    T, D = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)  # (B, H, T queries, T keys)
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v
    ### END SOLUTION


def causal_attention_cases(seed: int) -> list[tuple]:
    g = numbers(seed)
    cases = []
    for B, H, T, D, E in [(1, 1, 3, 4, 2), (2, 3, 7, 5, 6)]:
        q, k = (torch.randn(B, H, T, D, generator=g) for _ in range(2))
        cases.append((q, k, torch.randn(B, H, T, E, generator=g)))
    return cases


def ones_above(T: int, diagonal: int) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).triu(diagonal)


def scores_of(q, k):
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def not_scaled(q, k, v):
    """Your scores grow with the size of a head: a sum of D products has a spread of √D."""
    scores = q @ k.transpose(-2, -1)
    return scores.masked_fill(ones_above(q.shape[2], 1), -torch.inf).softmax(-1) @ v


def scaled_by_size(q, k, v):
    """You scale too much: what grows like D is the variance, not the spread."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1]
    return scores.masked_fill(ones_above(q.shape[2], 1), -torch.inf).softmax(-1) @ v


def softmax_over_queries(q, k, v):
    """Your weights sum to one over the queries; each query must share one unit among its keys."""
    return scores_of(q, k).masked_fill(ones_above(q.shape[2], 1), -torch.inf).softmax(-2) @ v


def masked_after_softmax(q, k, v):
    """You hide the future after it has taken its share of the softmax, so what is left sums to
    less than one."""
    return scores_of(q, k).softmax(-1).masked_fill(ones_above(q.shape[2], 1), 0.0) @ v


def masked_with_zero(q, k, v):
    """A hidden score of zero is not hidden: exp(0) is 1."""
    return scores_of(q, k).masked_fill(ones_above(q.shape[2], 1), 0.0).softmax(-1) @ v


def no_mask(q, k, v):
    """Every position sees the whole text; in training it would just copy the answer from the
    right."""
    return scores_of(q, k).softmax(-1) @ v


def past_hidden(q, k, v):
    """Your mask is upside down: it hides the past and shows the future."""
    return scores_of(q, k).masked_fill(ones_above(q.shape[2], 1).T, -torch.inf).softmax(-1) @ v


def itself_hidden(q, k, v):
    """A position cannot see itself, and the first one sees nothing at all: a softmax over nothing
    is NaN."""
    return scores_of(q, k).masked_fill(ones_above(q.shape[2], 0), -torch.inf).softmax(-1) @ v


def one_step_ahead(q, k, v):
    """Each position can see one step too far, which is exactly the token it has to guess."""
    return scores_of(q, k).masked_fill(ones_above(q.shape[2], 2), -torch.inf).softmax(-1) @ v


CAUSAL_ATTENTION = Exercise(
    solution=causal_attention,
    cases=causal_attention_cases,
    title="Causal attention",
    difficulty=2,
    importance=5,
    minutes=15,
    statement=r"""
Every position asks a question (its query), every position offers an answer (its value) under a label
(its key):

$$\text{attention}(q, k, v) = \text{softmax}\left(\frac{q k^\top}{\sqrt D} + \text{mask}\right) v$$

The mask keeps position $t$ from looking at positions after $t$. Write it without
`F.scaled_dot_product_attention`.

**Before you write:** what must the first row of the result be, whatever the queries are?
""",
    hints=[
        "Write the shape of the scores beside the line that makes them. Which axis are the keys?",
        "The mask is added **before** the softmax. Which number does exp turn into zero?",
        "`torch.ones(T, T).triu(diagonal=1)` is one strictly above the diagonal.",
    ],
    mistakes=[not_scaled, scaled_by_size, softmax_over_queries, masked_after_softmax,
              masked_with_zero, no_mask, past_hidden, itself_hidden, one_step_ahead],
    discussion="The first position sees only itself, so its result is the first value: a quick test "
    "for any attention code. (Vaswani et al., arXiv 1706.03762, eq. 1.)",
)  # fmt: skip


# 2. Rotary positions


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turn the pairs of every vector by angles that grow with its position (RoPE).

    Args:
        x: (B, H, T, D), D even. Pair i is (x[i], x[i + D/2]): the half-split layout.
        positions: (T,) integers, the position of each of the T vectors.
        theta: pair i turns by theta^(-2i/D) radians per position, counter-clockwise.

    Returns:
        (B, H, T, D).
    """
    ### BEGIN SOLUTION
    D = x.shape[-1]
    speeds = theta ** -(torch.arange(0, D, 2).float() / D)  # (D/2,)
    angles = positions[:, None].float() * speeds  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    ### END SOLUTION


def rotate_cases(seed: int) -> list[tuple]:
    g = numbers(seed)
    return [
        (torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), torch.tensor([1]), 100.0),
        (torch.randn(2, 3, 5, 8, generator=g), torch.arange(5), 10_000.0),
        (torch.randn(2, 3, 4, 6, generator=g), torch.arange(7, 11), 1e6),  # goes on after a cache
    ]


def turn(a, b, angles):
    return a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()


def angles_of(x, positions, theta):
    D = x.shape[-1]
    return positions[:, None] * theta ** -(torch.arange(0, D, 2) / D)


def interleaved_pairs(x, positions, theta):
    """You pair neighbours (0 with 1, 2 with 3); in the half-split layout the partner lives half a
    head away."""
    a, b = turn(x[..., 0::2], x[..., 1::2], angles_of(x, positions, theta))
    return torch.stack([a, b], dim=-1).flatten(-2)


def turned_clockwise(x, positions, theta):
    """You turn clockwise. Distances would still come out right, but no published weight would fit."""
    return torch.cat(turn(*x.chunk(2, -1), -angles_of(x, positions, theta)), -1)


def exponent_halved(x, positions, theta):
    """Your pairs turn too fast: the exponent must run from 0 almost to 1 over the pairs, yours
    stops half-way."""
    D = x.shape[-1]
    angles = positions[:, None] * theta ** -(torch.arange(D // 2) / D)
    return torch.cat(turn(*x.chunk(2, -1), angles), -1)


def exponent_positive(x, positions, theta):
    """Your later pairs turn faster and faster; they should turn slower."""
    angles = positions[:, None] * theta ** (torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    return torch.cat(turn(*x.chunk(2, -1), angles), -1)


def positions_counted_anew(x, positions, theta):
    """You count positions from zero; with a cache the first new token is not the first of the
    text."""
    return torch.cat(turn(*x.chunk(2, -1), angles_of(x, torch.arange(len(positions)), theta)), -1)


def layouts_mixed(x, positions, theta):
    """Your angles are laid out for neighbours, your pairs for halves: the two conventions are
    mixed."""
    angles = angles_of(x, positions, theta).repeat_interleave(2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-b, a], dim=-1) * angles.sin()


def minus_forgotten(x, positions, theta):
    """That is no rotation: lengths change, because one of the two sines has lost its sign."""
    angles = angles_of(x, positions, theta)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() + b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def theta_fixed(x, positions, theta):
    """You use a base of your own and not the one that is given; models differ in it."""
    return torch.cat(turn(*x.chunk(2, -1), angles_of(x, positions, 10_000.0)), -1)


ROTATE = Exercise(
    solution=rotate,
    cases=rotate_cases,
    title="Rotary positions",
    difficulty=3,
    importance=5,
    minutes=20,
    statement=r"""
RoPE tells a head where a vector stands by turning it. Its D numbers are taken as D/2 points in the
plane; point $i$ turns by $\theta^{-2i/D}$ radians per position:

$$(a, b) \mapsto (a \cos\varphi - b \sin\varphi,\; a \sin\varphi + b \cos\varphi),
\qquad \varphi = \text{position} \cdot \theta^{-2i/D}$$

The product of a turned query and a turned key then depends on the **distance** of the two alone.
Which numbers make a pair is a convention. Llama, Qwen and this course use half-split: number $i$ goes
with number $i + D/2$.
""",
    hints=[
        "Start with D = 2: one point, one angle. Then ask what changes for the next pair.",
        "You need a table of angles (T, D/2): positions down, pairs across.",
        "`a, b = x.chunk(2, dim=-1)` are all the first and all the second coordinates.",
    ],
    mistakes=[interleaved_pairs, turned_clockwise, exponent_halved, exponent_positive,
              positions_counted_anew, layouts_mixed, minus_forgotten, theta_fixed],
    discussion="Half of these mistakes train without any error and cost a little quality; all of them "
    "ruin weights that somebody else trained. (Su et al., arXiv 2104.09864, eq. 15.)",
)  # fmt: skip


# 3. Grouped heads


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in which H query heads share K key/value heads; heads joined at the end.

    Args:
        q: (B, H, T, D).
        k, v: (B, K, T, D), H a multiple of K. Query heads 0 to H/K - 1 use key/value head 0, the
            next H/K use head 1, and so on.

    Returns:
        (B, T, H·D): for every position the results of head 0, then of head 1, …
    """
    ### BEGIN SOLUTION
    B, H, T, D = q.shape
    groups = H // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
    return y.transpose(1, 2).reshape(B, T, H * D)
    ### END SOLUTION


def grouped_attention_cases(seed: int) -> list[tuple]:
    g = numbers(seed)
    cases = []
    for B, H, K, T, D in [(1, 4, 2, 3, 2), (2, 6, 2, 5, 4), (2, 6, 3, 7, 4)]:
        k, v = (torch.randn(B, K, T, D, generator=g) for _ in range(2))
        cases.append((torch.randn(B, H, T, D, generator=g), k, v))
    return cases


def attend_and_join(q, k, v, causal=True):
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return y.transpose(1, 2).flatten(2)


def share(x, heads):
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def tile(x, heads):
    return x.repeat(1, heads // x.shape[1], 1, 1)


def heads_dealt_round(q, k, v):
    """Your key heads come round like 0, 1, 0, 1; neighbours among the query heads should share
    one."""
    return attend_and_join(q, tile(k, q.shape[1]), tile(v, q.shape[1]))


def keys_and_values_apart(q, k, v):
    """Keys and values are spread differently: a head looks things up in one place and reads from
    another."""
    return attend_and_join(q, share(k, q.shape[1]), tile(v, q.shape[1]))


def first_head_for_all(q, k, v):
    """All query heads use the same key/value head; that is multi-query attention, an older cousin."""
    return attend_and_join(q, tile(k[:, :1], q.shape[1]), tile(v[:, :1], q.shape[1]))


def heads_averaged(q, k, v):
    """You average the key/value heads; each of them was learned for its own group of queries."""
    k, v = k.mean(1, keepdim=True), v.mean(1, keepdim=True)
    return attend_and_join(q, tile(k, q.shape[1]), tile(v, q.shape[1]))


def joined_without_transpose(q, k, v):
    """The shape is right, but time and heads are shuffled: a reshape never reorders numbers in
    memory."""
    B, H, T, D = q.shape
    y = F.scaled_dot_product_attention(q, share(k, H), share(v, H), is_causal=True)
    return y.reshape(B, T, H * D)


def heads_interlaced(q, k, v):
    """Within a position your heads are interlaced; all of head 0 comes first, then all of head 1."""
    y = F.scaled_dot_product_attention(
        q, share(k, q.shape[1]), share(v, q.shape[1]), is_causal=True
    )
    return y.permute(0, 2, 3, 1).flatten(2)


def sees_the_future(q, k, v):
    """The grouping is right, but positions look ahead."""
    return attend_and_join(q, share(k, q.shape[1]), share(v, q.shape[1]), causal=False)


GROUPED_ATTENTION = Exercise(
    solution=grouped_attention,
    cases=grouped_attention_cases,
    title="Grouped heads, joined again",
    difficulty=3,
    importance=4,
    minutes=15,
    statement="""
While a model writes, it keeps the keys and values of everything before. Eight heads, eight sets of
them? Grouped-query attention keeps two, and lets four query heads share each: a quarter of the
memory, nearly the same quality.

You may use `F.scaled_dot_product_attention` here (but not its `enable_gqa`). The two places where
this goes wrong are before and after it, and both keep the right shape.
""",
    hints=[
        "For H = 4 and K = 2, write down which key head each of the query heads 0, 1, 2, 3 uses.",
        "`repeat` and `repeat_interleave` give the same shape. Try both on `torch.arange(2)`.",
        "Before joining, the axes must stand in the order B, T, H, D.",
    ],
    mistakes=[heads_dealt_round, keys_and_values_apart, first_head_for_all, heads_averaged,
              joined_without_transpose, heads_interlaced, sees_the_future],
    discussion="(Ainslie et al., arXiv 2305.13245.) A model trained from nothing learns to live with "
    "the wrong order of heads, which is why this survives until somebody loads published weights.",
)  # fmt: skip


# 4. Left padding


def mask_and_positions(real: Tensor) -> tuple[Tensor, Tensor]:
    """Return who may look at whom, and where everybody stands, in a batch padded on the left.

    Args:
        real: (B, T) bool, True for tokens and False for padding.

    Returns:
        mask: (B, T, T) bool, True where the query (second axis) may look at the key (third): real
            keys at or before the query. A padded query looks at itself alone.
        positions: (B, T) int64, counted over real tokens, the first of them 0; 0 for padding.
    """
    ### BEGIN SOLUTION
    T = real.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    itself = torch.eye(T, dtype=torch.bool)
    mask = causal & real[:, None, :] | itself
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    return mask, positions
    ### END SOLUTION


def mask_and_positions_cases(seed: int) -> list[tuple]:
    g = numbers(seed)
    cases = []
    for B, T in [(2, 4), (3, 7)]:
        padding = torch.randint(1, T - 1, (B, 1), generator=g)
        padding[0] = 0  # the longest prompt has none
        cases.append((torch.arange(T) >= padding,))
    return cases


def causal_of(real):
    return torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()


def itself_of(real):
    return torch.eye(real.shape[1], dtype=torch.bool)


def count_real(real):
    return (real.long().cumsum(1) - 1).clamp(min=0)


def padding_is_visible(real):
    """Real tokens look at the padding, so a prompt's answer depends on who else is in the batch."""
    return causal_of(real).expand(len(real), -1, -1), count_real(real)


def queries_masked(real):
    """You silence the padded queries; what must not be seen are the padded keys."""
    return causal_of(real) & real[:, :, None] | itself_of(real), count_real(real)


def padded_rows_empty(real):
    """A padded query sees nothing in your mask, and a softmax over nothing is NaN, which then
    spreads."""
    return causal_of(real) & real[:, None, :], count_real(real)


def future_is_visible(real):
    """The padding is hidden, but positions look ahead."""
    return real[:, None, :] | itself_of(real).expand(len(real), -1, -1), count_real(real)


def padding_counted(real):
    """You count the padding as text, so a prompt starts at another position in every batch."""
    mask = causal_of(real) & real[:, None, :] | itself_of(real)
    return mask, torch.arange(real.shape[1]).expand(len(real), -1)


def counted_from_one(real):
    """The first real token stands at 0, as it did in training; yours stands at 1."""
    mask = causal_of(real) & real[:, None, :] | itself_of(real)
    return mask, real.long().cumsum(1)


def negative_positions(real):
    """Your padding stands at a negative position; harmless for a rotation, an error for a table."""
    mask = causal_of(real) & real[:, None, :] | itself_of(real)
    return mask, real.long().cumsum(1) - 1


MASK_AND_POSITIONS = Exercise(
    solution=mask_and_positions,
    cases=mask_and_positions_cases,
    title="Prompts of unequal length",
    difficulty=4,
    importance=4,
    minutes=15,
    statement="""
To answer several prompts at once, the short ones are padded **on the left**, so that all of them end
at the same place and the next token goes to the same column. The rule to keep: a prompt's answer must
not depend on its neighbours in the batch. Two things can break it, what a token sees and where it
thinks it stands.

For `real = [[False, True, True]]` the positions are `[[0, 0, 1]]` and the mask is
`[[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]`.
""",
    hints=[
        "Write the mask for the example by hand, row by row: each row is one query.",
        "Two conditions joined by `&`: not ahead, and a real key. Then repair the padded rows.",
        "`cumsum` over the real tokens numbers them. Mind where it starts.",
    ],
    mistakes=[padding_is_visible, queries_masked, padded_rows_empty, future_is_visible,
              padding_counted, counted_from_one, negative_positions],
    discussion="In reinforcement learning this bug is nasty: answers are sampled from one distribution "
    "and trained under another, and nothing ever raises an error.",
)  # fmt: skip


# 5. Open-ended: an induction head by hand


def induction(
    tokens: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor], vocab: int
) -> Tensor:
    """Guess the next token by looking up what followed the current one last time.

    Args:
        tokens: (B, T) ids below `vocab`.
        attend: causal attention without scaling, (q (B, T, D), k (B, T, D), v (B, T, E)) to
            (B, T, E). Your only way to move something from one position to another.

    Returns:
        (B, T) ids: where tokens[t] occurred before, the token that stood after it. Elsewhere any.
    """
    ### BEGIN SOLUTION
    B, T = tokens.shape
    sharp = 100.0  # scores so far apart that the softmax picks one key
    what = F.one_hot(tokens, vocab).float()  # (B, T, vocab)
    where = F.one_hot(torch.arange(T), T).float().expand(B, T, T)
    to_the_left = F.one_hot((torch.arange(T) - 1).clamp(min=0), T).float().expand(B, T, T)

    previous = attend(sharp * to_the_left, where, what)  # head 1: what stands on my left?
    previous[:, 0] = 0  # nothing stands to the left of the first token
    following = attend(sharp * what, previous, what)  # head 2: who has my token on the left?
    return following.argmax(-1)
    ### END SOLUTION


def induction_cases(seed: int) -> list[tuple]:
    g = numbers(seed)
    order = torch.stack([torch.randperm(9, generator=g) for _ in range(8)]).view(4, 18)
    return [(order, 11)]  # 9 tokens in one order, then in another: each occurred once before


def run_induction(function, tokens, vocab):
    """Run with the attention as promised, and again with one that picks a single key."""
    calls = 0

    def attend_with(factor: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attend(q, k, v):
            nonlocal calls
            calls += 1
            scores = (q @ k.transpose(-2, -1)).mul(factor)
            return scores.masked_fill(ones_above(q.shape[1], 1), -torch.inf).softmax(-1) @ v

        return attend

    given, sharper = (function(tokens, attend_with(factor), vocab) for factor in (1.0, 1000.0))
    return {"given": given, "sharper": sharper, "calls": calls // 2}


def judge_induction(cases: list[tuple], results: list[dict]) -> str | None:
    (tokens, _), result = cases[0], results[0]
    if tuple(result["given"].shape) != tuple(tokens.shape):
        return f"expected the shape {tuple(tokens.shape)}, yours is {tuple(result['given'].shape)}."
    if not result["calls"]:
        return sentence(looked_up_in_a_loop)
    known, right = followers(tokens)
    wrong = known & (result["given"] != right)
    if not wrong.any():
        return None
    if not (known & (result["sharper"] != right)).any():
        return sentence(too_soft)
    if (result["given"] == tokens)[known].all():
        return sentence(finds_itself)
    if not (wrong & (tokens != tokens[:, :1])).any():
        return sentence(first_is_its_own_left)
    b, t = wrong.nonzero()[0].tolist()
    return (
        f"{int(wrong.sum())} of {int(known.sum())} guesses are wrong. In {tokens[b, : t + 1].tolist()} "
        f"the last token was followed by {int(right[b, t])} before; you say {int(result['given'][b, t])}."
    )


def followers(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return where a token occurred before, and what followed it then, the slow and plain way."""
    known, right = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens)
    for b, row in enumerate(tokens.tolist()):
        for t, token in enumerate(row):
            if token in row[:t]:
                known[b, t], right[b, t] = True, row[row.index(token) + 1]
    return known, right


def one_hots(tokens, vocab):
    B, T = tokens.shape
    where = F.one_hot(torch.arange(T), T).float().expand(B, T, T)
    left = F.one_hot((torch.arange(T) - 1).clamp(min=0), T).float().expand(B, T, T)
    return F.one_hot(tokens, vocab).float(), where, left


def looked_up_in_a_loop(tokens, attend, vocab):
    """The guesses may be right, but nothing went through `attend`: a transformer has no other way
    to look back."""
    return followers(tokens)[1]


def finds_itself(tokens, attend, vocab):
    """You find the earlier place of your own token and read that token again; the one after it is
    wanted."""
    what, _, _ = one_hots(tokens, vocab)
    return attend(100 * what, what, what).argmax(-1)


def too_soft(tokens, attend, vocab):
    """The right keys win, but not by enough: your softmax blends them with all the others."""
    what, where, left = one_hots(tokens, vocab)
    previous = attend(left, where, what)
    previous[:, 0] = 0
    return attend(what, previous, what).argmax(-1)


def first_is_its_own_left(tokens, attend, vocab):
    """Nearly. The first token has nobody on its left, and in your first head it then sees itself."""
    what, where, left = one_hots(tokens, vocab)
    return attend(100 * what, attend(100 * left, where, what), what).argmax(-1)


def looks_to_the_right(tokens, attend, vocab):
    """Your first head asks for its right neighbour, which the causal mask hides; turn the question
    round."""
    what, where, _ = one_hots(tokens, vocab)
    right = where.roll(-1, dims=1)
    return attend(100 * what, what, attend(100 * right, where, what)).argmax(-1)


INDUCTION = Exercise(
    solution=induction,
    cases=induction_cases,
    run=run_induction,
    judge=judge_induction,
    title="Build a copying circuit by hand (open-ended)",
    difficulty=5,
    importance=4,
    minutes=40,
    statement="""
Small models learn to copy quite suddenly, after a million tokens or so. What they find then is two
heads that work together: an *induction head*. Build one with your own hands, with no training.

After `A B C A` the answer is `B`: look up where the current token stood before, and read what came
next. You get `attend`, plain causal attention, and nothing else that reaches across positions. Choose
queries, keys and values yourself; one-hot vectors of tokens and of positions are all you need.

The check looks only at the guesses, and whether `attend` made them. **Once it works:** what does your
circuit say after `A B C A D A`? Can you make it prefer the latest `A`? Can you do it with one head?
""",
    hints=[
        "A position cannot look to the right of the earlier `A`. But the `B` there can know what is "
        "on its left.",
        "Head 1 brings to every position the token before it. Then head 2 asks: who has *my* token on "
        "the left? And reads that position's own token.",
        "Head 1: queries one-hot of t - 1, keys one-hot of t, values one-hot of the token. Large "
        "scores make the softmax choose. Take care of the first position.",
    ],
    mistakes=[looked_up_in_a_loop, finds_itself, too_soft, first_is_its_own_left,
              looks_to_the_right],
    discussion="""
After `A B C A D A` both followers get half the weight; adding a little of the position to the keys
of head 2 makes the latest one win. One head cannot do it: the `B` must carry its left neighbour before
it can be found by it, and that takes a layer of its own: one-layer models have no induction heads.
(Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al.,
arXiv 2209.11895.)
""",
)  # fmt: skip

EXERCISES = [CAUSAL_ATTENTION, ROTATE, GROUPED_ATTENTION, MASK_AND_POSITIONS, INDUCTION]
