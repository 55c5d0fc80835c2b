"""From JSON lines to batches of tensors: checked rows, packing, length buckets.

Every row is checked as it is read, and a bad one is an error with file, line and mend: a row that
trains silently wrong costs more than a run that does not start.

Pretraining text is *packed*: documents are joined and cut into blocks of equal length, so that no
position is padding. Chat rows keep their own length and are *bucketed*: rows of like length share
a batch, so that little is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minimind.errors import UserError
from minimind.tokenizer import ROLES, Tokenizer

IGNORED = -100  # the label of a position that is not trained; F.cross_entropy's own default
Example = dict[str, list[int]]
Batch = dict[str, Tensor]


def read_jsonl(path: str | Path, check: Callable[[dict], str | None]) -> list[dict]:
    """Return the rows of a JSON-lines file.

    Args:
        check: looks at a row and returns what is wrong with it, or None.

    Raises:
        UserError: no such file, no rows, not UTF-8, not JSON, or `check` found a fault; file,
            line number and value are named.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"There is no data file {path}. Check data_path (a .jsonl file, one JSON object per line)."
        )
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            rows.append(_parse_row(line, f"{path}, line {number}", check))
    if not rows:
        raise UserError(f"{path} is empty. It needs one JSON object per line.")
    return rows


def _parse_row(line: bytes, where: str, check: Callable[[dict], str | None]) -> dict:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {error.start + 1} is not UTF-8 ({line[error.start : error.start + 4]!r}). "
            "Save the file as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON ({error.msg} at column {error.colno}): {_short(line.decode())}. "
            "Each line must be one JSON object."
        ) from error
    fault = check(row) if isinstance(row, dict) else "is not a JSON object ({...}). Wrap it in one."
    if fault:
        raise UserError(f"{where}: {fault} The row: {_short(json.dumps(row, ensure_ascii=False))}")
    return row


def _short(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[:limit] + "…"


def check_text(row: dict) -> str | None:
    """Return what is wrong with a pretraining row `{"text": …}`, or None."""
    if not isinstance(row.get("text"), str):
        return f'needs a field "text" with a string; it has {sorted(row)}.'
    return None if row["text"].strip() else '"text" is empty. Remove the row.'


def check_conversation(row: dict) -> str | None:
    """Return what is wrong with a chat row `{"conversations": [{"role", "content"}, …]}`, or None."""
    messages = row.get("conversations")
    if not isinstance(messages, list) or not messages:
        return f'needs a field "conversations" with a list of messages; it has {sorted(row)}.'
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return f'message {number} needs "role" and "content", both strings.'
        if message.get("role") not in ROLES:
            return f"message {number} has the role {message.get('role')!r}; use one of {', '.join(ROLES)}."
    if not any(message["role"] == "assistant" for message in messages):
        return "no message has the role 'assistant', so there is nothing to learn. Add the answer."
    return None


class PackedTokens(Sequence):
    """Documents joined into one stream of tokens and cut into blocks of `block` tokens.

    Neighbouring blocks share one token: the last of a block is a label there and the first input
    of the next, so every token of the stream is predicted exactly once. A tail shorter than a
    block is left out.
    """

    def __init__(self, tokens: np.ndarray, block: int) -> None:
        self.tokens, self.block = tokens, block

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // (self.block - 1))

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * (self.block - 1)
        ids = self.tokens[start : start + self.block].tolist()
        return {"input_ids": ids, "labels": ids}


def pack(texts: Sequence[str], tokenizer: Tokenizer, block: int) -> PackedTokens:
    """Encode documents, put `<|endoftext|>` after each, and pack them into blocks.

    Documents in a block can see the ones before them; the end token tells the model to forget.
    """
    stream = [np.array([*ids, tokenizer.pad_id], np.int32) for ids in tokenizer.encode_batch(texts)]
    return PackedTokens(np.concatenate(stream), block)


def pad_batch(examples: Sequence[Example], pad_id: int) -> Batch:
    """Stack rows of unequal length into (B, T) tensors: ids padded with `pad_id`, labels with -100.

    Padding stands on the right. A causal model never looks there from a real token, so no
    attention mask is needed in training.
    """
    width = max(len(example["input_ids"]) for example in examples)
    return {
        name: torch.tensor([e[name] + [fill] * (width - len(e[name])) for e in examples])
        for name, fill in (("input_ids", pad_id), ("labels", IGNORED))
    }


def batch_order(
    lengths: Sequence[int], batch_size: int, seed: int, window: int = 50
) -> list[list[int]]:
    """Return the batches of one epoch as lists of row numbers; every row is in exactly one.

    Rows are shuffled, then sorted by length inside windows of `window` batches, cut into batches,
    and the batches shuffled: random enough to train on, alike enough to need little padding.
    """
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(lengths))
    lengths = np.asarray(lengths)
    batches = []
    for start in range(0, len(shuffled), window * batch_size):
        rows = shuffled[start : start + window * batch_size]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[i : i + batch_size].tolist() for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def useful_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Return the share of positions that are tokens, not padding, when rows are batched so."""
    positions = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return sum(lengths[i] for batch in batches for i in batch) / positions


@dataclass
class Batches:
    """An endless, seekable stream of batches: number m is the same whenever it is asked for.

    That is what makes a run resumable: the state of the data is one number.
    """

    examples: Sequence[Example]
    batch_size: int
    seed: int
    collate: Callable[[Sequence[Example]], Batch]
    lengths: Sequence[int]

    def __post_init__(self) -> None:
        self.per_epoch = -(-len(self.examples) // self.batch_size)
        self._epoch, self._order = -1, []

    def rows(self, number: int) -> list[int]:
        """Return the numbers of the examples in a batch."""
        epoch, position = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                batch_order(self.lengths, self.batch_size, self.seed + epoch),
            )
        return self._order[position]

    def __getitem__(self, number: int) -> Batch:
        return self.collate([self.examples[i] for i in self.rows(number)])

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(self.per_epoch))
