"""Scores on your own files: perplexity of any text, multiple choice by log-likelihood.

A small model answers multiple-choice questions at chance, so a score stands beside its chance
level and its confidence interval, or it says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minimind.data import IGNORED, Batch, pad_batch, read_jsonl
from minimind.errors import UserError
from minimind.losses import token_logps
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer

BATCH = 16


def read_text(path: str | Path) -> str:
    """Return the content of a text file. UserError if it is missing, empty or not UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start + 1} is not UTF-8. Save it as UTF-8."
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}. Give the path of a text file.") from error
    if not text:
        raise UserError(f"{path} is empty. Give a file with text.")
    return text


@torch.no_grad()
def text_nats(
    model: MiniMind, tokenizer: Tokenizer, text: str, length: int
) -> tuple[Tensor, Tensor]:
    """Return -ln p of every token of a text, and where there are tokens: both (windows, length).

    The text starts after `<|endoftext|>` and is cut into windows of `length` predictions; each
    window sees only itself, so column t is the loss with t + 1 tokens of context. The last window
    has no tokens after the text's end; -ln p is 0 there.

    Raises:
        UserError: a length below 1, or a loss that is not finite.
    """
    if length < 1:
        raise UserError(f"length={length} must be at least 1: the tokens of a window.")
    ids = [tokenizer.pad_id, *tokenizer.encode(text)]
    windows = [ids[start : start + length + 1] for start in range(0, len(ids) - 1, length)]
    nats = torch.zeros(len(windows), length)
    there = torch.zeros(len(windows), length, dtype=torch.bool)
    for start in range(0, len(windows), BATCH):
        rows = windows[start : start + BATCH]
        batch = pad_batch([{"input_ids": ids, "labels": ids} for ids in rows], tokenizer.pad_id)
        logps, labels = _logps(model, batch), batch["labels"][:, 1:]
        nats[start : start + len(rows), : labels.shape[1]] = -logps
        there[start : start + len(rows), : labels.shape[1]] = labels != IGNORED
    return nats, there


def _logps(model: MiniMind, batch: Batch) -> Tensor:
    """Return ln p of the labels, (B, T - 1), 0 where there are none. UserError if one is not finite."""
    logps = token_logps(
        model(batch["input_ids"].to(model.device)), batch["labels"].to(model.device)
    ).cpu()
    if not logps.isfinite().all():
        raise UserError("The model's loss is not finite: its weights are damaged, or it diverged.")
    return logps


def bits_per_byte_of(nats: Tensor, text: str) -> float:
    """Return the bits for each byte of UTF-8, from `text_nats`: comparable between tokenizers."""
    return float(nats.double().sum()) / math.log(2) / len(text.encode("utf-8"))


def mean_nats(nats: Tensor, there: Tensor) -> float:
    """Return the mean loss per token, from `text_nats` or some columns of it."""
    return float(nats.double().sum() / there.sum())


def perplexity_of(nats: Tensor, there: Tensor) -> float:
    """Return e to the mean loss per token: comparable for one tokenizer only."""
    return float(np.exp(mean_nats(nats, there)))


@dataclass
class Question:
    """One multiple-choice question; `answer` is the index of the right choice."""

    question: str
    choices: list[str]
    answer: int


@dataclass
class Score:
    """How many of `questions` were right, what guessing gives, and a 95% interval of the share."""

    right: int
    questions: int
    chance: float

    @property
    def share(self) -> float:
        """Share right."""
        return self.right / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of `share`."""
        return wilson(self.right, self.questions)

    @property
    def verdict(self) -> str:
        """Whether the interval lies above chance, below, or around it."""
        low, high = self.interval
        return (
            "above chance"
            if low > self.chance
            else "below chance"
            if high < self.chance
            else "at chance"
        )


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval for a share (E. B. Wilson, JASA 22, 1927; 95% for z = 1.96).

    Unlike share ± z·σ it stays inside [0, 1] and has a width even at 0 of n.
    """
    share, shrink = right / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / shrink
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def check_question(row: dict) -> str | None:
    """Return what is wrong with a row `{"question", "choices": […], "answer"}`, or None.

    The choices may also be columns "A", "B", …; the answer is an index from 0, a letter, or the
    text of the choice.
    """
    choices = _choices(row)
    if not isinstance(row.get("question"), str) or not row["question"]:
        return f'needs a field "question" with a string; it has {sorted(row)}.'
    if len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        return 'needs "choices" with at least two strings, or the columns "A", "B", ….'
    return None if _answer(row, choices) is not None else (
        f'"answer" is {row.get("answer")!r}: no index, letter or text of its {len(choices)} choices.'
    )  # fmt: skip


def _choices(row: dict) -> list:
    listed = row.get("choices")
    return listed if isinstance(listed, list) else [row[c] for c in "ABCDEFGHIJ" if c in row]


def _answer(row: dict, choices: list[str]) -> int | None:
    answer = row.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(choices) else None
    if not isinstance(answer, str) or not answer:
        return None
    if choices.count(answer) == 1:
        return choices.index(answer)
    place = "ABCDEFGHIJ".find(answer.strip().upper())
    return place if len(answer.strip()) == 1 and 0 <= place < len(choices) else None


def read_questions(path: str | Path) -> list[Question]:
    """Read questions from JSON lines. UserError as in `read_jsonl`."""
    rows = read_jsonl(path, check_question)
    return [Question(r["question"], _choices(r), _answer(r, _choices(r))) for r in rows]


@torch.no_grad()
def choice_logps(
    model: MiniMind, tokenizer: Tokenizer, questions: Sequence[Question], as_chat: bool = False
) -> list[list[float]]:
    """Return ln p(choice | question) for every choice of every question.

    As plain text the question follows `<|endoftext|>` and the choice follows a space; as chat the
    question is the user's turn and the choice the assistant's, its `<|im_end|>` included.

    Raises:
        UserError: a loss that is not finite.
    """
    texts = [(q.question, choice) for q in questions for choice in q.choices]
    pairs = [_encode(tokenizer, *text, as_chat) for text in texts]
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    logps = [0.0] * len(pairs)
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        found = [pairs[place] for place in places]
        rows = [{"input_ids": p + c, "labels": [IGNORED] * len(p) + c} for p, c in found]
        batch = pad_batch(rows, tokenizer.pad_id)
        for place, value in zip(places, _logps(model, batch).sum(1).tolist(), strict=True):
            logps[place] = value
    values = iter(logps)
    return [[next(values) for _ in question.choices] for question in questions]


def _encode(
    tokenizer: Tokenizer, question: str, choice: str, as_chat: bool
) -> tuple[list[int], list[int]]:
    if not as_chat:
        return [tokenizer.pad_id, *tokenizer.encode(question)], tokenizer.encode(" " + choice)
    asked = [{"role": "user", "content": question}]
    prompt = tokenizer.encode_chat(asked, add_generation_prompt=True)
    return prompt, [*tokenizer.encode(choice), tokenizer.eos_id]


def score_choices(
    questions: Sequence[Question], logps: Sequence[Sequence[float]], per_byte: bool
) -> Score:
    """Take the likeliest choice of every question; `per_byte` divides by its length first.

    Without that a short choice wins because it is short.
    """
    right = 0
    for question, values in zip(questions, logps, strict=True):
        sizes = [len(choice.encode("utf-8")) if per_byte else 1 for choice in question.choices]
        scores = [value / size for value, size in zip(values, sizes, strict=True)]
        right += scores.index(max(scores)) == question.answer
    chance = sum(1 / len(question.choices) for question in questions) / len(questions)
    return Score(right, len(questions), chance)
