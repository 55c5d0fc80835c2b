"""Reasoning distillation: learn to write out a thought before the answer, from answers that do.

Rows are chat rows whose assistant turns read `<think>…</think><answer>…</answer>`. The loss is SFT's
with more weight on the four tags, so that the form is learnt first: without it nothing can be read
off, checked or rewarded later. It is the distillation step of DeepSeek-R1 (arXiv 2501.12948, §2.4).
Who learns to think only forgets to chat: `chat_path` mixes ordinary chat rows in.

Left out: the reinforcement learning by which the teacher came to think, and the filtering of its
answers; the rows are taken as they come.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from minimind.config import NORMALIZERS, ReasonConfig
from minimind.corpus import Rows, hash_of, read_rows
from minimind.data import IGNORED, Batch, check_conversation, pad_batch
from minimind.errors import UserError, bad_value
from minimind.losses import token_logps
from minimind.stages.common import batch_logps
from minimind.stages.sft import encode_chat_row, read_chats
from minimind.stages.task import Metrics, Task
from minimind.tokenizer import TAGS, Tokenizer

FORM = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


def tag_weights(
    labels: Tensor, tag_ids: Iterable[int] | Mapping[str, int], weight: float = 10.0
) -> Tensor:
    """Return the weight of every label, (B, T): `weight` on the tags, 1 on the rest, 0 on -100.

    A tag in the prompt has the label -100 and so no weight: only what the assistant says counts.

    Args:
        labels: (B, T), aligned with the input ids and not shifted; so are the weights.
        tag_ids: the ids of the tags, each a single token; `Tokenizer.tag_ids` will do.
    """
    ids = tag_ids.values() if isinstance(tag_ids, Mapping) else tag_ids
    is_tag = torch.stack([labels == number for number in ids]).any(0)
    return torch.where(is_tag, weight, 1.0).masked_fill(labels == IGNORED, 0.0)


def weighted_token_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, normalizer: str = "tokens"
) -> Tensor:
    """Weighted sum of -ln p(label[t+1] | tokens up to t), divided by what `normalizer` says.

    "tokens" divides by the number of labels, as the original did: a larger weight then makes the
    whole loss, and its gradient, larger. "weights" divides by the sum of the weights: a mean.
    They differ by one factor, which the clipped gradient and Adam hardly feel; with weights of 1
    both are `next_token_loss`.

    Args:
        logits: (B, T, V).
        labels, weights: (B, T), aligned with the input ids; the shift by one happens here.

    Returns:
        A scalar in nats; 0 with a gradient if no label is left.
    """
    return weighted_mean(-token_logps(logits, labels), labels, weights, normalizer)


def weighted_mean(nll: Tensor, labels: Tensor, weights: Tensor, normalizer: str) -> Tensor:
    """Return `weighted_token_loss` from -ln p of the labels, (B, T-1)."""
    total = (weights[:, 1:] * nll).sum()
    divisor = loss_divisor(labels, weights, normalizer)
    return total / torch.where(divisor > 0, divisor, 1)


def loss_divisor(labels: Tensor, weights: Tensor, normalizer: str) -> Tensor:
    """Return what `weighted_token_loss` divides by: the number of labels, or their weights' sum."""
    if normalizer not in NORMALIZERS:
        raise bad_value("normalizer", normalizer, NORMALIZERS)
    trained = labels[:, 1:] != IGNORED
    return trained.sum() if normalizer == "tokens" else (weights[:, 1:] * trained).sum()


def reasoning_loss(
    model: nn.Module, batch: Batch, tag_ids: Mapping[str, int], weight: float, normalizer: str
) -> tuple[Tensor, Metrics]:
    """The training loss. Metrics that compare between weights: `nll` per token, `tag_nll` per tag."""
    nll, labels = -batch_logps(model, batch), batch["labels"]
    loss = weighted_mean(nll, labels, tag_weights(labels, tag_ids, weight), normalizer)
    every, tags = tag_weights(labels, tag_ids, 1.0), tag_weights(labels, tag_ids, 2.0)
    metrics = {
        "nll": weighted_mean(nll.detach(), labels, every, "weights"),
        "tag_nll": weighted_mean(nll.detach(), labels, tags - every, "weights"),
    }
    return loss + model.router_loss, metrics


def split_thought(text: str) -> tuple[str, str] | None:
    """Return (thought, answer) of `<think>…</think><answer>…</answer>`, or None for any other form.

    >>> split_thought("<think>3+4=7</think><answer>7</answer>")
    ('3+4=7', '7')
    """
    found = FORM.fullmatch(text)
    if not found or any(text.count(tag) != 1 for tag in TAGS):
        return None
    thought, answer = found.groups()
    return thought.strip(), answer.strip()


def check_reasoning(row: dict) -> str | None:
    """Return what is wrong with a reasoning row, or None."""
    fault = check_conversation(row)
    if fault:
        return fault
    for number, message in enumerate(row["conversations"], start=1):
        fault = message["role"] == "assistant" and fault_of_form(message["content"])
        if fault:
            return f"message {number} {fault} Write <think>…</think><answer>…</answer>."
    return None


def fault_of_form(text: str) -> str | None:
    """Return why a text is not one thought and one answer between their tags, or None."""
    for tag in TAGS:
        if text.count(tag) != 1:
            return f"has {tag} {text.count(tag)} times instead of once."
    order = sorted(TAGS, key=text.index)
    if order != list(TAGS):
        return f"has its tags in the order {' '.join(order)}."
    parts = split_thought(text)
    if parts is None:
        return "has text outside the tags."
    return None if parts[1] else "has an empty answer."


def read_reasoning(
    path: str, tokenizer: Tokenizer, max_length: int, skip_bad_rows: int = 0
) -> tuple[Rows, Counter]:
    """Open a file of reasoning rows; return those with a label, and what was cut, counted.

    Raises:
        UserError: a row of another form (see `check_reasoning`), or no row is left.
    """
    rows = read_rows(
        path, check_reasoning, partial(encode_chat_row, tokenizer, max_length=max_length),
        partial(look_at_reasoning, tokenizer, max_length), f"reason {hash_of(tokenizer)} {max_length}",
        bool(skip_bad_rows),
    )  # fmt: skip
    if not len(rows):
        raise UserError(f"{path}: no row is left ({dict(rows.faults)}). Raise max_seq_len.")
    return rows, rows.faults


def look_at_reasoning(tokenizer: Tokenizer, max_length: int, row: dict) -> tuple[int, str | None]:
    """Return a row's length, 0 if it has no label and is left out; and what was cut off, if anything."""
    example = encode_chat_row(tokenizer, row, max_length)
    labels = sum(label != IGNORED for label in example["labels"])
    if not labels:
        return 0, f"row left out: its prompt fills max_seq_len={max_length}"
    spoken = [m["content"] for m in row["conversations"] if m["role"] == "assistant"]
    whole = sum(len(tokenizer.encode(text)) + 1 for text in spoken)
    cut = (
        f"answer cut at max_seq_len={max_length}: its end is not learnt" if labels < whole else None
    )
    return len(example["input_ids"]), cut


def rehearsal(config: ReasonConfig, tokenizer: Tokenizer, rows: int) -> list[Rows]:
    """Return `chat_share` x `rows` chat rows of `chat_path`, drawn by the seed; at most all of them.

    An empty list if there are no chats to rehearse.
    """
    if not config.chat_path:
        return []
    chats = read_chats(config.chat_path, tokenizer, config.max_seq_len, config.skip_bad_rows)
    wanted = min(len(chats), round(config.chat_share * rows))
    drawn = random.Random(config.seed).sample(range(len(chats)), wanted)
    return [chats[drawn]] if drawn else []


def reason_task(config: ReasonConfig, model: nn.Module, tokenizer: Tokenizer) -> Task:
    """Encode the conversations of `data_path` (and of `eval_data_path`), and chats to rehearse."""
    tag_ids = tokenizer.tag_ids
    length, held, skip = config.max_seq_len, config.eval_data_path, config.skip_bad_rows
    rows, faults = read_reasoning(config.data_path, tokenizer, length, skip)
    parts = [rows, *rehearsal(config, tokenizer, len(rows))]

    def count(batch: Batch) -> float:
        weights = tag_weights(batch["labels"], tag_ids, config.tag_weight)
        return float(loss_divisor(batch["labels"], weights, config.normalizer))

    return Task(
        train=rows if len(parts) == 1 else ConcatDataset(parts),
        heldout=read_reasoning(held, tokenizer, length, skip)[0] if held else [],
        lengths=np.concatenate([part.lengths for part in parts]),
        collate=partial(pad_batch, pad_id=tokenizer.pad_id),
        loss=partial(
            reasoning_loss, tag_ids=tag_ids, weight=config.tag_weight, normalizer=config.normalizer
        ),
        count=count,
        warnings=dict(faults),
    )
