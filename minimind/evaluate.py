"""Held-out measures: what a stage is worth, in numbers somebody else can check.

- bits per byte of text: comparable between tokenizers, and with gzip;
- completion of facts: has the model taken up what the text says?
- exact match of whole answers, greedily generated: right or wrong, nothing in between.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from minimind.data import IGNORED, Example, pad_batch
from minimind.generate import generate
from minimind.losses import token_logps
from minimind.model import MiniMind
from minimind.rewards import answer_of
from minimind.stages.pretrain import count_labels, next_token_loss
from minimind.tokenizer import Tokenizer

BATCH = 64


@dataclass
class Measure:
    """One held-out figure. `better` says which way is good: "lower" or "higher"."""

    value: float
    better: str
    held_out_examples: int


@dataclass
class Answer:
    """What a model answered to a question, beside what is right."""

    question: str
    expected: str
    answer: str
    kind: str = ""

    @property
    def right(self) -> bool:
        """Whether the answer is the expected one: all of it, or, if no tags are expected, what
        stands in its answer tags."""
        said, wanted = self.answer.strip(), self.expected.strip()
        if answer_of(wanted) is None and answer_of(said) is not None:
            said = answer_of(said)
        return said == wanted


@torch.no_grad()
def bits_per_byte(model: MiniMind, tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Return the bits that the model needs for each byte of UTF-8 text.

    Every text is a document of its own: it starts after `<|endoftext|>` and its end is predicted
    too. Sum of -log2 p over all tokens, divided by the number of bytes of text.
    """
    end = [tokenizer.pad_id]
    documents = sorted((end + ids + end for ids in tokenizer.encode_batch(texts)), key=len)
    nats = 0.0
    for start in range(0, len(documents), BATCH):
        rows = [{"input_ids": d, "labels": d} for d in documents[start : start + BATCH]]
        batch = pad_batch(rows, tokenizer.pad_id)
        labels = batch["labels"].to(model.device)
        loss = next_token_loss(model(batch["input_ids"].to(model.device)), labels)
        nats += float(loss) * int((labels[:, 1:] != IGNORED).sum())
    return nats / math.log(2) / sum(len(text.encode("utf-8")) for text in texts)


def answers(
    model: MiniMind, tokenizer: Tokenizer, rows: Sequence[dict], max_new_tokens: int = 48
) -> list[Answer]:
    """Answer the last question of every chat row, greedily; the reference is its last turn."""
    prompts = [
        tokenizer.encode_chat(row["conversations"][:-1], add_generation_prompt=True) for row in rows
    ]
    completions = complete(model, prompts, max_new_tokens, tokenizer.eos_id)
    return [
        Answer(
            question=row["conversations"][-2]["content"],
            expected=row["conversations"][-1]["content"],
            answer=tokenizer.decode(completion),
            kind=row.get("kind", ""),
        )
        for row, completion in zip(rows, completions, strict=True)
    ]


def completed_facts(model: MiniMind, tokenizer: Tokenizer, rows: Sequence[dict]) -> list[Answer]:
    """Let the model complete each `{"prompt", "answer"}` and cut what it says to the answer's length."""
    prompts = [[tokenizer.pad_id, *tokenizer.encode(row["prompt"])] for row in rows]
    longest = max(len(tokenizer.encode(row["answer"])) for row in rows)
    texts = [tokenizer.decode(ids) for ids in complete(model, prompts, longest, tokenizer.pad_id)]
    return [
        Answer(row["prompt"], row["answer"], text[: len(row["answer"])], row.get("kind", ""))
        for row, text in zip(rows, texts, strict=True)
    ]


def complete(
    model: MiniMind, prompts: Sequence[list[int]], max_new_tokens: int, eos_id: int
) -> list[list[int]]:
    """Generate greedily in batches of prompts of like length; results keep the order of `prompts`."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        outputs = generate(
            model, [prompts[i] for i in rows], max_new_tokens, temperature=0, eos_id=eos_id
        )
        for i, output in zip(rows, outputs, strict=True):
            results[i] = output
    return results


def share_right(found: Sequence[Answer]) -> float:
    """Return the share of answers that are right."""
    return sum(answer.right for answer in found) / len(found)


def by_kind(found: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Group answers by the kind of question."""
    groups: dict[str, list[Answer]] = {}
    for answer in found:
        groups.setdefault(answer.kind, []).append(answer)
    return groups


def check_fact(row: dict) -> str | None:
    """Return what is wrong with a row `{"prompt", "answer"}`, or None."""
    if all(isinstance(row.get(name), str) and row[name] for name in ("prompt", "answer")):
        return None
    return 'needs "prompt" and "answer", both strings.'


@torch.no_grad()
def answer_loss(model: MiniMind, tokenizer: Tokenizer, examples: Sequence[Example]) -> float:
    """Return the mean of -ln p over all labelled tokens, in nats."""
    nats = counted = 0.0
    for start in range(0, len(examples), BATCH):
        batch = pad_batch(examples[start : start + BATCH], tokenizer.pad_id)
        logps = token_logps(
            model(batch["input_ids"].to(model.device)), batch["labels"].to(model.device)
        )
        nats -= float(logps.sum())
        counted += count_labels(batch)
    return nats / counted


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the chance that k of the samples hold a right one: 1 - C(n-c, k) / C(n, k).

    Counting over all choices of k varies less than drawing k once (arXiv 2107.03374, eq. 1).
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def samples(found: Sequence[Answer], each: int = 2) -> list[dict]:
    """Return `each` answers of every kind, the first ones: not picked by hand."""
    return [
        {**asdict(answer), "right": answer.right}
        for group in by_kind(found).values()
        for answer in group[:each]
    ]


def most_common_answer(found: Sequence[Answer]) -> float:
    """Return the share right when every question of a kind gets that kind's most common answer."""
    groups = by_kind(found).values()
    return sum(Counter(a.expected for a in group).most_common(1)[0][1] for group in groups) / len(
        found
    )
