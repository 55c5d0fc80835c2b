"""Sampling from the model: a batch of prompts in, a batch of completions out.

The prompts are padded on the left, read once, and kept in a KV cache; then every step feeds one
token per row. A row that has ended leaves the batch. Every row has a random stream of its own, so
what is sampled for it does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minimind.errors import UserError
from minimind.model import KVCache, MiniMind
from minimind.tokenizer import Message, Tokenizer


def next_token_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Turn logits (B, V) into the distribution that is sampled, (B, V).

    Args:
        temperature: divides the logits; 0 puts all probability on the best token.
        top_k: keep the k best tokens; 0 keeps all.
        top_p: keep the smallest set of best tokens whose probability reaches top_p (nucleus
            sampling, arXiv 1904.09751). The best token always stays.
    """
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits.float() / temperature
    if top_k:
        worst_kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < worst_kept, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True)
        better = ordered.cumsum(-1) - ordered  # probability of all tokens before this one
        ordered = ordered.masked_fill(better >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    return probabilities / probabilities.sum(-1, keepdim=True)


def sample(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return one token per row (B,): where the running sum of (B, V) passes uniform (B,) in [0, 1)."""
    running = probabilities.double().cumsum(-1)
    threshold = uniform.double()[:, None] * running[:, -1:]
    return (running <= threshold).sum(-1).clamp(max=probabilities.shape[-1] - 1)


def left_pad(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return prompts as (B, T) ids, padded on the left, and their attention mask (B, T)."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def row_streams(rows: int, steps: int, seed: int | None) -> Tensor:
    """Return uniform numbers (rows, steps), row r from a generator of its own."""
    base = int(torch.randint(2**31, (1,))) if seed is None else seed
    streams = [
        torch.rand(steps, generator=torch.Generator().manual_seed(base + r)) for r in range(rows)
    ]
    return torch.stack(streams)


@torch.no_grad()
def generate(
    model: MiniMind, prompts: Sequence[Sequence[int]], max_new_tokens: int = 128, temperature: float = 1.0,
    top_k: int = 0, top_p: float = 1.0, eos_id: int | None = None, seed: int | None = None,
) -> list[list[int]]:  # fmt: skip
    """Continue every prompt (a list of token ids) and return the new ids of each.

    A completion ends after `eos_id`, which is part of it, or after `max_new_tokens`. The same
    seed gives the same completions; at temperature 0 there is no randomness.

    Raises:
        UserError: no prompt, an empty prompt, or one that leaves no room for the answer.
    """
    _check_prompts(model, prompts, max_new_tokens)
    was_training = model.training
    model.eval()
    ids, mask = left_pad(prompts, 0, model.device)
    capacity = ids.shape[1] + max_new_tokens
    cache = KVCache(model.config, len(prompts), capacity, like=model.model.embed_tokens.weight)
    uniform = row_streams(len(prompts), max_new_tokens, seed).to(model.device)
    alive = torch.arange(len(prompts), device=model.device)  # which prompt each row of the batch is
    completions: list[list[int]] = [[] for _ in prompts]
    padded = len({len(prompt) for prompt in prompts}) > 1

    for step in range(max_new_tokens):
        hidden = model.model(ids, mask if padded else None, cache)[:, -1]
        probabilities = next_token_probabilities(model.lm_head(hidden), temperature, top_k, top_p)
        token = sample(probabilities, uniform[alive, step])
        for row, value in zip(alive.tolist(), token.tolist(), strict=True):
            completions[row].append(value)
        going_on = (token != eos_id).nonzero()[:, 0] if eos_id is not None else alive
        if len(going_on) == 0:
            break
        if len(going_on) < len(alive):
            alive, token, mask = alive[going_on], token[going_on], mask[going_on]
            cache.keep_rows(going_on)
        ids, mask = token[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)

    model.train(was_training)
    return completions


@torch.no_grad()
def stream(
    model: MiniMind, prompt: Sequence[int], max_new_tokens: int = 128, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, eos_id: int | None = None, seed: int | None = None,
) -> Iterator[int]:  # fmt: skip
    """Yield the ids of one completion as they come: what `generate` returns for this prompt alone.

    The model must be in eval mode. UserError as in `generate`, before the first id.
    """
    _check_prompts(model, [prompt], max_new_tokens)
    cache = KVCache(
        model.config, 1, len(prompt) + max_new_tokens, like=model.model.embed_tokens.weight
    )
    uniform = row_streams(1, max_new_tokens, seed).to(model.device)
    ids = torch.tensor([prompt], device=model.device)
    for step in range(max_new_tokens):
        logits = model.lm_head(model.model(ids, None, cache)[:, -1])
        token = sample(
            next_token_probabilities(logits, temperature, top_k, top_p), uniform[:, step]
        )
        yield int(token)
        if int(token) == eos_id:
            return
        ids = token[:, None]


def _check_prompts(model: MiniMind, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UserError("generate needs at least one prompt, and every prompt at least one token.")
    longest, room = max(len(p) for p in prompts), model.config.max_position_embeddings
    if longest + max_new_tokens > room:
        raise UserError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones do not fit into "
            f"max_position_embeddings={room}. Shorten the prompt or lower max_new_tokens."
        )


def chat(
    model: MiniMind, tokenizer: Tokenizer, messages: Sequence[Message], max_new_tokens: int = 128,
    temperature: float = 0.0, **sampling: float,
) -> str:  # fmt: skip
    """Return the assistant's answer to a conversation (a list of {"role", "content"})."""
    prompt = tokenizer.encode_chat(messages, add_generation_prompt=True)
    answer = generate(
        model, [prompt], max_new_tokens, temperature, eos_id=tokenizer.eos_id, **sampling
    )[0]
    return tokenizer.decode(answer)
