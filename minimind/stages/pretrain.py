"""Pretraining: predict the next token of plain text.

Rows `{"text": …}` are joined and packed into blocks without padding. Maximising the likelihood of
text teaches the language and, with it, whatever the text says.

Left out: masking attention between the documents of a block, which at this size changes nothing
that can be measured.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.config import TrainConfig
from minimind.corpus import own_tokenizer, read_tokens
from minimind.data import IGNORED, Batch, PackedTokens, pad_batch
from minimind.errors import UserError
from minimind.losses import is_small, next_labels
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
    predictions, targets = logits.flatten(0, 1).float(), next_labels(labels).flatten()
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
    if is_small(labels, model.config.vocab_size):
        loss = next_token_loss(model(batch["input_ids"]), labels)
    else:
        count = (labels[:, 1:] != IGNORED).sum().clamp(min=1)
        loss = -batch_logps(model, batch).sum() / count
    return loss + model.router_loss, {}


def read_packed(
    path: str | Path, tokenizer: Tokenizer, block: int, skip_bad_rows: int = 0
) -> tuple[PackedTokens, dict[str, int]]:
    """Pack `{"text": …}` rows, or a token file of them; return also the bad rows left out, by kind.

    UserError if they do not fill one block.
    """
    tokens, skipped = read_tokens(path, tokenizer, bool(skip_bad_rows))
    packed = PackedTokens(tokens, block)
    if not len(packed):
        raise UserError(
            f"{path} holds {len(packed.tokens)} tokens, fewer than one block of max_seq_len={block}. "
            "Lower max_seq_len or give more text."
        )
    return packed, skipped


def text_tokenizer(config: TrainConfig) -> Tokenizer:
    """Return the tokenizer that belongs to `data_path`; it is trained on it first if there is none."""
    return own_tokenizer(config.data_path)


def pretrain_task(config: TrainConfig, model: nn.Module, tokenizer: Tokenizer) -> Task:
    """Pack the texts of `data_path` (and of `eval_data_path`) into blocks of `max_seq_len`."""
    length, held, skip = config.max_seq_len, config.eval_data_path, config.skip_bad_rows
    train, skipped = read_packed(config.data_path, tokenizer, length, skip)
    return Task(
        train=train,
        heldout=read_packed(held, tokenizer, length, skip)[0] if held else [],
        lengths=np.full(len(train), length),
        collate=partial(pad_batch, pad_id=tokenizer.pad_id),
        loss=language_model_loss,
        count=count_labels,
        warnings=skipped,
    )
