"""Pretraining: predict the next token of plain text.

Rows `{"text": …}` are joined and packed into blocks without padding. Maximising the likelihood of
text teaches the language and, with it, whatever the text says.

Left out: masking attention between the documents of a block, which at this size changes nothing
that can be measured.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from minimind.config import TrainConfig
from minimind.data import IGNORED, Batch, PackedTokens, check_text, pack, pad_batch, read_jsonl
from minimind.errors import UserError
from minimind.losses import fits_one_chunk
from minimind.stages.common import batch_logps
from minimind.stages.task import Metrics, Task
from minimind.tokenizer import Tokenizer


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log p(label[t+1] | tokens up to t) over the labels that are not -100.

    Args:
        logits: (B, T, V).
        labels: (B, T), aligned with the input ids; the shift by one happens here. The first
            label of a row is never used: nothing comes before it.

    Returns:
        A scalar in nats; 0 with a gradient if no label is left.
    """
    predictions = logits[:, :-1].flatten(0, 1).float()  # (B·(T-1), V)
    targets = labels[:, 1:].flatten()
    total = F.cross_entropy(predictions, targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


def count_labels(batch: Batch) -> int:
    """Return how many labels `next_token_loss` is the mean of."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def language_model_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
    """The training loss of pretraining and SFT: next token, and the routers' balance if any.

    It is `next_token_loss`; where all logits at once would be too many, they come in chunks.
    """
    labels = batch["labels"]
    if fits_one_chunk(labels, model.config.vocab_size):
        loss = next_token_loss(model(batch["input_ids"]), labels)
    else:
        count = (labels[:, 1:] != IGNORED).sum().clamp(min=1)
        loss = -batch_logps(model, batch).sum() / count
    return loss + model.router_loss, {}


def read_packed(path: str | Path, tokenizer: Tokenizer, block: int) -> PackedTokens:
    """Read `{"text": …}` rows and pack them. UserError if they do not fill one block."""
    texts = [row["text"] for row in read_jsonl(path, check_text)]
    packed = pack(texts, tokenizer, block)
    if not len(packed):
        raise UserError(
            f"{path} holds {len(packed.tokens)} tokens, fewer than one block of max_seq_len={block}. "
            "Lower max_seq_len or give more text."
        )
    return packed


def pretrain_task(config: TrainConfig, model: nn.Module, tokenizer: Tokenizer) -> Task:
    """Pack the texts of `data_path` (and of `eval_data_path`) into blocks of `max_seq_len`."""
    train = read_packed(config.data_path, tokenizer, config.max_seq_len)
    held = config.eval_data_path
    return Task(
        train=train,
        heldout=read_packed(held, tokenizer, config.max_seq_len) if held else [],
        lengths=[config.max_seq_len] * len(train),
        collate=partial(pad_batch, pad_id=tokenizer.pad_id),
        loss=language_model_loss,
        count=count_labels,
    )
