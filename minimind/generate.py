"""Sampling from the model: a batch of prompts in, a batch of completions out.

The prompts are padded on the left, read once, and kept in a KV cache; then every step feeds one
token per row. A row that has ended leaves the batch. Every row has a random stream of its own, so
what is sampled for it does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.config import round_up
from minimind.errors import UserError
from minimind.model import KVCache, MiniMind, positions_and_mask
from minimind.reader import Reader, compiled_read
from minimind.tokenizer import Message, Tokenizer

ASK_EVERY = 16  # steps of compiled sampling between two looks whether all rows have ended
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1: times any x it stays below x
Shape = Callable[[Tensor], Tensor]  # logits (B, V) to the distribution that is sampled (B, V)
Step = tuple[Tensor, Tensor, Tensor]


@dataclass
class Rollouts:
    """Sampled answers, `N = prompts x num_generations` rows; those to one prompt stand together.

    Rows start with the prompt, the answer follows, zeros fill up to T: a causal model needs no mask
    to be trained on them, since nothing that is trained looks at the padding.

    Attributes:
        prompt_ids: the prompts, one per row.
        prompt_lengths: (N,) tokens in each prompt.
        input_ids: (N, T) prompt and answer.
        mask: (N, T) bool, True where the token was sampled.
        logps: (N, T) float32, ln p of the sampled tokens when they were sampled; 0 elsewhere.
        finished: (N,) bool, ended with `eos_id`; the others were cut at `max_new_tokens`.
        completions: the answers as token ids, the last `eos_id` included.
    """

    prompt_ids: list[list[int]]
    prompt_lengths: Tensor
    input_ids: Tensor
    mask: Tensor
    logps: Tensor
    finished: Tensor
    completions: list[list[int]]

    @property
    def truncated(self) -> Tensor:
        """(N,) bool: cut before the answer ended."""
        return ~self.finished


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
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    if temperature != 1:
        logits = logits / temperature
    if top_k:
        worst_kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < worst_kept, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True)
        better = ordered.cumsum(-1) - ordered  # probability of all tokens before this one
        ordered = ordered.masked_fill(better >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def sample(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return one token per row (B,): where the running sum of (B, V) passes uniform (B,) in [0, 1)."""
    running = probabilities.cumsum(-1)
    threshold = uniform.clamp(max=BELOW_ONE).to(running.dtype)[:, None] * running[:, -1:]
    return torch.searchsorted(running, threshold, right=True)[:, 0]


def left_pad(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return prompts as (B, T) ids, padded on the left, and their attention mask (B, T)."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def row_streams(rows: int, steps: int, seed: int | None, first: int = 0) -> Tensor:
    """Return uniform numbers (rows, steps) in [0, 1), row r from a stream of its own, `first` + r.

    Seed and stream are hashed together, so the streams of two seeds have nothing in common.
    """
    base = int(torch.randint(2**31, (1,))) if seed is None else seed
    streams = [np.random.default_rng((base, first + r)).random(steps) for r in range(rows)]
    return torch.from_numpy(np.stack(streams))


def generate(
    model: MiniMind, prompts: Sequence[Sequence[int]], max_new_tokens: int = 128, temperature: float = 1.0,
    top_k: int = 0, top_p: float = 1.0, eos_id: int | None = None, seed: int | None = None,
) -> list[list[int]]:  # fmt: skip
    """Continue every prompt (a list of token ids) and return the new ids of each.

    A completion ends after `eos_id`, which is part of it, or after `max_new_tokens`. The same
    seed gives the same completions; at temperature 0 there is no randomness.

    Raises:
        UserError: no prompt, an empty prompt, or one that leaves no room for the answer; a setting
            that nothing can be sampled with.
    """
    shape = _shape(temperature, top_k, top_p)
    with _ready(model, prompts, max_new_tokens, seed):
        steps = _steps(model, prompts, 1, max_new_tokens, eos_id, seed, shape)
        tokens, _, lengths = _collect(steps, len(prompts), max_new_tokens, eos_id, model.device)
    return [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]


def stream(
    model: MiniMind, prompt: Sequence[int], max_new_tokens: int = 128, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, eos_id: int | None = None, seed: int | None = None,
) -> Iterator[int]:  # fmt: skip
    """Yield the ids of one completion as they come: what `generate` returns for this prompt alone.

    UserError as in `generate`, before the first id.
    """
    shape = _shape(temperature, top_k, top_p)
    with _ready(model, [prompt], max_new_tokens, seed):
        for _, token, _ in _steps(model, [prompt], 1, max_new_tokens, eos_id, seed, shape):
            yield int(token)


def sample_rollouts(
    model: MiniMind, prompts: Sequence[Sequence[int]], num_generations: int, max_new_tokens: int,
    eos_id: int, seed: int | None = None, compiled: bool = False, first_row: int = 0,
) -> Rollouts:  # fmt: skip
    """Sample `num_generations` answers to every prompt, in rows p0, p0, …, p1, p1, …

    They come from exactly the distribution that is trained: temperature 1, no top-k, no top-p. A
    prompt is read once; its keys and values are shared by its group. `logps` are those of the
    sampling itself. Under autocast the rollouts run in its precision, as the training does.

    Args:
        compiled: compile the step of one token, for long runs on a GPU: the first call costs a
            minute or so, and rows that have ended stay in the batch to keep its shape, as the
            cache keeps its: a multiple of 64 positions.
        first_row: the random stream of the first answer; the others follow. A part of a batch, with
            the number of its first row, samples what it would within the whole.

    Raises:
        UserError: as `generate`, or num_generations below 1.
    """
    if num_generations < 1:
        raise UserError(f"num_generations={num_generations} must be at least 1.")
    with _ready(model, prompts, max_new_tokens, seed):
        shape, count = next_token_probabilities, len(prompts) * num_generations
        steps = _steps(
            model,
            prompts,
            num_generations,
            max_new_tokens,
            eos_id,
            seed,
            shape,
            compiled,
            first_row,
        )
        tokens, logps, lengths = _collect(steps, count, max_new_tokens, eos_id, model.device)
    return _as_rollouts(prompts, num_generations, tokens, logps, lengths, eos_id)


def _as_rollouts(
    prompts: Sequence[Sequence[int]], copies: int, tokens: Tensor, logps: Tensor, lengths: Tensor, eos_id: int
) -> Rollouts:  # fmt: skip
    """Put prompts and answers, tokens and logps (N, M) with lengths (N,), into right-padded rows."""
    prompt_ids = [list(prompt) for prompt in prompts for _ in range(copies)]
    completions = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    starts = torch.tensor([len(prompt) for prompt in prompt_ids], device=tokens.device)
    rows = [p + c for p, c in zip(prompt_ids, completions, strict=True)]
    width = max(len(row) for row in rows)
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=tokens.device)
    place = torch.arange(width, device=tokens.device) - starts[:, None]  # in the answer
    mask = (place >= 0) & (place < lengths[:, None])
    last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
    logps = logps.gather(1, place.clamp(0, logps.shape[1] - 1)).masked_fill(~mask, 0.0)
    return Rollouts(prompt_ids, starts, input_ids, mask, logps, last == eos_id, completions)


def _collect(steps: Iterator[Step], count: int, max_new_tokens: int, eos_id: int | None,
             device: torch.device) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the tokens (N, max_new_tokens) of `_steps`, ln p of each, and how many of each row count."""
    tokens = torch.zeros(count, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(count, max_new_tokens, device=device)
    for place, (rows, token, probability) in enumerate(steps):
        tokens[rows, place] = token
        logps[rows, place] = probability.log()
    ends = tokens == eos_id if eos_id is not None else torch.zeros_like(tokens, dtype=torch.bool)
    lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, max_new_tokens)
    return tokens, logps, lengths


@torch.inference_mode()
def _steps(
    model: MiniMind, prompts: Sequence[Sequence[int]], copies: int, max_new_tokens: int, eos_id: int | None,
    seed: int | None, shape: Shape, compiled: bool = False, first_row: int = 0,
) -> Iterator[Step]:  # fmt: skip
    """Continue every prompt `copies` times: the loop behind everything that samples.

    Yields:
        for every step: the answers in the batch (B,), a token for each, and its probability.
    """
    state = _prefill(model, prompts, copies, max_new_tokens, compiled)
    advance = _compiled_step if compiled else _step
    rows = torch.arange(len(state.mask), device=model.device)
    uniform = row_streams(len(rows), max_new_tokens, seed, first_row).to(model.device)
    done = torch.zeros_like(rows, dtype=torch.bool)
    for step in range(max_new_tokens):
        probabilities = shape(state.logits)
        token = sample(probabilities, uniform[rows, step])
        yield rows, token, probabilities.gather(1, token[:, None])[:, 0].float()
        done = done | (token == eos_id) if eos_id is not None else done
        ask = not compiled or step % ASK_EVERY == 0  # a GPU waits for the host to have its answer
        left = int((~done).sum()) if ask else len(rows)
        if left == 0 or step + 1 == max_new_tokens:
            return
        if left < len(rows) and not compiled:
            order = state.drop_rows(done.nonzero()[:, 0])
            rows, token, done = rows[order], token[order], done[order]
        advance(state, token)


@dataclass
class _State:
    """The batch between two tokens: N rows, of which the first tokens may be padding.

    `mask` (N, capacity) is False there; `positions` (N, 1) are those of the last tokens; `logits`
    (N, V) say what comes next.
    """

    reader: Reader
    cache: KVCache
    padded: bool
    mask: Tensor
    positions: Tensor
    logits: Tensor

    def drop_rows(self, gone: Tensor) -> Tensor:
        """Forget rows of the batch; return which old row stands in each place now."""
        order = self.cache.drop_rows(gone)
        self.mask, self.positions = self.mask[order], self.positions[order]
        return order


def _prefill(
    model: MiniMind,
    prompts: Sequence[Sequence[int]],
    copies: int,
    max_new_tokens: int,
    compiled: bool,
) -> _State:
    """Read every prompt once, then copy its keys and values for each of its answers."""
    ids, mask = left_pad(prompts, 0, model.device)
    capacity, padded = ids.shape[1] + max_new_tokens, not bool(mask.all())
    if compiled:
        capacity = round_up(capacity)  # the same for many lengths of prompts: compiled once
    cache = KVCache(model.config, len(prompts), capacity, like=model.model.embed_tokens.weight)
    reader = Reader(model, _precision(model), rows=0 if compiled else len(prompts) * copies)
    positions, may_look = positions_and_mask(ids, mask if padded else None, 0)
    logits = reader(ids, positions, may_look, cache)
    cache.repeat_rows(copies)
    mask = mask.bool().repeat_interleave(copies, 0)
    last = mask.sum(1, keepdim=True) - 1
    mask = F.pad(mask, (0, capacity - ids.shape[1]), value=True)
    return _State(reader, cache, padded, mask, last, logits.repeat_interleave(copies, 0))


def _step(state: _State, token: Tensor) -> None:
    """Read one token per row, (N,)."""
    state.positions += 1
    positions = state.positions if state.padded else state.positions[:1]
    may_look = state.mask[:, None, None, : state.cache.length + 1] if state.padded else None
    state.logits = state.reader(token[:, None], positions, may_look, state.cache)


def _compiled_step(state: _State, token: Tensor) -> None:
    """`_step` in shapes that never change: over the whole capacity, with a mask."""
    cache = state.cache
    state.positions += 1
    cache.place = torch.tensor([cache.length], device=token.device)
    filled = torch.arange(state.mask.shape[1], device=token.device) <= cache.length
    may_look = (state.mask & filled)[:, None, None]
    state.logits = compiled_read()(state.reader, token[:, None], state.positions, may_look, cache)
    cache.length += 1


def _precision(model: MiniMind) -> torch.dtype:
    """Return autocast's dtype if it is on, else that of the weights."""
    kind = model.device.type
    on = torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else model.lm_head.weight.dtype


@contextmanager
def _ready(
    model: MiniMind, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int | None
) -> Iterator[None]:
    """Check prompts and settings, and hold the model in eval mode."""
    if max_new_tokens < 1 or (seed or 0) < 0:
        raise UserError(
            f"max_new_tokens={max_new_tokens} and seed={seed}: give at least 1 token, and a seed from "
            "0 up or None."
        )
    _check_prompts(model, prompts, max_new_tokens)
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _shape(temperature: float, top_k: int, top_p: float) -> Shape:
    """Return `next_token_probabilities` with these settings. UserError if they leave no token."""
    if not (0 <= temperature < float("inf") and top_k >= 0 and 0 < top_p <= 1):
        raise UserError(
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}: give a temperature from 0 (the "
            "best token) up, top_k from 0 (all tokens) up, and top_p above 0 and at most 1 (all)."
        )
    return partial(next_token_probabilities, temperature=temperature, top_k=top_k, top_p=top_p)


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
