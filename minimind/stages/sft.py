"""Supervised fine-tuning: learn to answer, from conversations.

Rows `{"conversations": [{"role", "content"}, …]}` are written in the chat template. The loss is
the one of pretraining; what is new is the mask: only what the assistant says is a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from minimind.config import TrainConfig
from minimind.corpus import Rows, hash_of, read_rows
from minimind.data import IGNORED, Example, check_conversation, pad_batch
from minimind.stages.pretrain import count_labels, language_model_loss
from minimind.stages.task import Task
from minimind.tokenizer import Message, Tokenizer


def chat_labels(
    tokenizer: Tokenizer, messages: Sequence[Message], max_length: int
) -> tuple[list[int], list[int]]:
    """Encode a conversation and mark what is trained.

    The labels align with the ids and are -100 except on every assistant turn's content and its
    `<|im_end|>`. The header `<|im_start|>assistant\\n` and the newline after the turn are not
    trained: the template writes them, never the model. Both lists are cut to `max_length`
    together, at the end, so the mask cannot slide.

    Returns:
        (input_ids, labels), two lists of equal length.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        header, body, tail = tokenizer.encode_turn(message)
        trained = body if message["role"] == "assistant" else [IGNORED] * len(body)
        input_ids += header + body + tail
        labels += [IGNORED] * len(header) + trained + [IGNORED] * len(tail)
    return input_ids[:max_length], labels[:max_length]


def read_chats(
    path: str | Path, tokenizer: Tokenizer, max_length: int, skip_bad_rows: int = 0
) -> Rows:
    """Open a file of chat rows; a row whose answers are all cut off stays, with no label."""

    def encode(row: dict) -> Example:
        return encode_chat_row(tokenizer, row, max_length)

    return read_rows(
        path, check_conversation, encode, lambda row: (len(encode(row)["input_ids"]), None),
        f"chat {hash_of(tokenizer)} {max_length}", bool(skip_bad_rows),
    )  # fmt: skip


def encode_chat_row(tokenizer: Tokenizer, row: dict, max_length: int) -> Example:
    """Encode a chat row with `chat_labels`."""
    input_ids, labels = chat_labels(tokenizer, row["conversations"], max_length)
    return {"input_ids": input_ids, "labels": labels}


def sft_task(config: TrainConfig, model: nn.Module, tokenizer: Tokenizer) -> Task:
    """Encode the conversations of `data_path` (and of `eval_data_path`)."""
    length, held, skip = config.max_seq_len, config.eval_data_path, config.skip_bad_rows
    train = read_chats(config.data_path, tokenizer, length, skip)
    return Task(
        train=train,
        heldout=read_chats(held, tokenizer, length, skip) if held else [],
        lengths=train.lengths,
        collate=partial(pad_batch, pad_id=tokenizer.pad_id),
        loss=language_model_loss,
        count=count_labels,
        warnings=dict(train.faults),
    )
