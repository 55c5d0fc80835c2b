"""Held-out measures: what a stage is worth, in numbers somebody else can check.

- bits per byte of text: comparable between tokenizers, and with gzip;
- completion of facts: has the model taken up what the text says?
- exact match of whole answers, greedily generated: right or wrong, nothing in between.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch

from minimind.config import data_samples
from minimind.data import IGNORED, check_conversation, check_text, pad_batch, read_jsonl
from minimind.generate import generate
from minimind.model import MiniMind
from minimind.stages.pretrain import next_token_loss
from minimind.stages.reason import check_reasoning, split_thought
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
        """Whether the whole answer is the expected one."""
        return self.answer.strip() == self.expected.strip()


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


def measure_pretrain(
    model: MiniMind, tokenizer: Tokenizer, limit: int | None = None
) -> tuple[dict, list]:
    """Bits per byte of the held-out documents and share of facts completed; samples of the latter."""
    texts = [row["text"] for row in read_jsonl(data_samples("pretrain_heldout.jsonl"), check_text)][
        :limit
    ]
    facts = read_jsonl(data_samples("facts_heldout.jsonl"), check_fact)[:limit]
    model.eval()
    found = completed_facts(model, tokenizer, facts)
    measures = {
        "bits_per_byte": Measure(bits_per_byte(model, tokenizer, texts), "lower", len(texts)),
        "facts_completed": Measure(share_right(found), "higher", len(found)),
    }
    return measures, found


def measure_sft(
    model: MiniMind, tokenizer: Tokenizer, limit: int | None = None
) -> tuple[dict, list]:
    """Exact match over all held-out questions, and over each kind."""
    rows = read_jsonl(data_samples("sft_heldout.jsonl"), check_conversation)
    rows = rows if limit is None else rows[:: max(1, len(rows) // limit)]
    found = answers(model.eval(), tokenizer, rows)
    measures = {"exact_match": Measure(share_right(found), "higher", len(found))}
    for kind, group in by_kind(found).items():
        measures[f"exact_match_{kind}"] = Measure(share_right(group), "higher", len(group))
    return measures, found


TRAINED_OPERATIONS = ("2", "3", "4", "5")  # most chains in reason.jsonl; the longer ones are few


def answer_of(text: str) -> str | None:
    """Return what stands in the first `<answer>…</answer>`, thought or no thought; None if nothing."""
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return found and found.group(1).strip()


def answered(answer: Answer) -> bool:
    """Whether the number is right, whatever was thought. (`Answer.right` asks for all of it.)"""
    return answer_of(answer.answer) == answer_of(answer.expected)


def thought_of(text: str) -> str | None:
    """Return the thought of an answer in the right form, else None."""
    parts = split_thought(text)
    return parts and parts[0]


def reasoning_answers(
    model: MiniMind, tokenizer: Tokenizer, limit: int | None = None
) -> list[Answer]:
    """Answer the held-out chains, with room for the longest right thought and half as much again."""
    rows = read_jsonl(data_samples("reason_heldout.jsonl"), check_reasoning)
    rows = rows if limit is None else rows[:: max(1, len(rows) // limit)]
    longest = max(len(tokenizer.encode(row["conversations"][-1]["content"])) for row in rows)
    return answers(model.eval(), tokenizer, rows, max_new_tokens=longest * 3 // 2)


def reasoning_measures(found: Sequence[Answer], tokenizer: Tokenizer) -> dict[str, Measure]:
    """What answers to chains are worth.

    `format_rate`: in the form thought, answer. `answer`: the number is right, on the trained numbers
    of operations and (`answer_5`) on each. `right_thought`: every step is right too; with ten
    possible numbers a wrong thought still meets the right one sometimes. `thought_tokens_off`: by
    how many tokens a thought is longer or shorter than the right one, on average.
    """
    trained = [answer for answer in found if answer.kind in TRAINED_OPERATIONS]
    thoughts = [(thought_of(a.answer), thought_of(a.expected)) for a in found]
    off = [abs(len(tokenizer.encode(mine or "")) - len(tokenizer.encode(right)))
           for mine, right in thoughts]  # fmt: skip

    def share(good: Iterable[bool], n: int) -> Measure:
        return Measure(sum(good) / n, "higher", n)

    same = (thought_of(a.answer) == thought_of(a.expected) for a in trained)
    return {
        "format_rate": share((mine is not None for mine, _ in thoughts), len(found)),
        "answer": share(map(answered, trained), len(trained)),
        "right_thought": share(same, len(trained)),
        "thought_tokens_off": Measure(sum(off) / len(off), "lower", len(off)),
        **{
            f"answer_{kind}": share(map(answered, group), len(group))
            for kind, group in sorted(by_kind(found).items())
        },
    }


def measure_reason(
    model: MiniMind, tokenizer: Tokenizer, limit: int | None = None
) -> tuple[dict, list]:
    """Form, number and thought of greedy answers to the held-out chains."""
    found = reasoning_answers(model, tokenizer, limit)
    return reasoning_measures(found, tokenizer), found


MEASURES = {"pretrain": measure_pretrain, "sft": measure_sft, "reason": measure_reason}


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
