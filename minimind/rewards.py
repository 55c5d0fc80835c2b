"""What an answer is worth: small functions of text, put together by name and weight.

A reward sees the problem (a row of the RL data) and the text that the model wrote. What can be
checked is checked; what cannot is judged by a learned reward model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minimind.errors import UserError, bad_value
from minimind.tokenizer import TAGS

FORM = re.compile(
    r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL
)  # what a reasoning answer looks like


def answer_of(text: str) -> str | None:
    """Return what stands in the first <answer>…</answer>, stripped; None if there is none."""
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return found and found.group(1).strip()


def exact(text: str, right: str) -> float:
    """1 if the text inside <answer> is the right answer, else 0. A text without tags earns 0."""
    return float(answer_of(text) == right.strip())


def format_reward(text: str) -> float:
    """0.5 if the text is <think>…</think><answer>…</answer> with each tag once, else 0."""
    return 0.5 * bool(FORM.fullmatch(text) and all(text.count(tag) == 1 for tag in TAGS))


def tag_count_reward(text: str) -> float:
    """0.25 for each of the four tags that appears exactly once: a slope towards the format."""
    return sum(0.25 for tag in TAGS if text.count(tag) == 1)


def length_reward(text: str, limit: int = 200) -> float:
    """-1 per `limit` characters, at least -1: what a text costs by its length alone."""
    return -min(len(text) / limit, 1.0)


def repetition_reward(text: str, n: int = 3) -> float:
    """Minus the share of n-grams of words that have been seen before in the text: 0 to almost -1."""
    words = text.split()
    grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(grams.values())
    return len(grams) / total - 1 if total else 0.0


Row = dict
Reward = Callable[[Sequence[Row], Sequence[str]], Tensor]

REWARDS: dict[str, Callable[[Row, str], float]] = {
    "exact": lambda row, text: exact(text, row["answer"]) if "answer" in row else 0.0,
    "format": lambda row, text: format_reward(text),
    "tags": lambda row, text: tag_count_reward(text),
    "length": lambda row, text: length_reward(text),
    "repetition": lambda row, text: repetition_reward(text),
}

SPANS = {
    "exact": (0, 1),
    "format": (0, 0.5),
    "tags": (0, 1),
    "length": (-1, 0),
    "repetition": (-1, 0),
}
SPAN_OF_A_MODEL = (-3, 3)  # scores of a learned reward model are clipped to it


class Rewards:
    """Several rewards, added up with weights: `Rewards([("exact", 1.0), ("format", 0.5)])`.

    A part is a name in `REWARDS`, or a function (rows, texts) -> (N,) with a `__name__`, such as a
    learned reward model. Calling it returns the totals (N,) and the parts, each (N,), unweighted.

    Raises:
        UserError: an unknown name; a part that returns the wrong number of rewards or a NaN.
    """

    def __init__(self, parts: Sequence[tuple[str | Reward, float]]) -> None:
        self.parts: list[tuple[str, Reward, float]] = []
        for part, weight in parts:
            if isinstance(part, str) and part not in REWARDS:
                raise bad_value("reward", part, REWARDS)
            name = part if isinstance(part, str) else part.__name__
            self.parts.append(
                (name, _for_all(REWARDS[part]) if isinstance(part, str) else part, weight)
            )

    def __call__(
        self, rows: Sequence[Row], texts: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        found = {name: checked(part(rows, texts), len(texts), name) for name, part, _ in self.parts}
        total = torch.zeros(len(texts))
        for name, _, weight in self.parts:
            total += weight * found[name]
        return total, found

    @property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest total that are possible."""
        ends = [[w * end for end in SPANS.get(name, SPAN_OF_A_MODEL)] for name, _, w in self.parts]
        return sum(map(min, ends)), sum(map(max, ends))


def _for_all(reward: Callable[[Row, str], float]) -> Reward:
    return lambda rows, texts: torch.tensor(
        [reward(row, text) for row, text in zip(rows, texts, strict=True)]
    )


def checked(values: object, count: int, name: str) -> Tensor:
    """Return `count` rewards as float32. UserError if there are more or fewer, or one is NaN."""
    rewards = torch.as_tensor(values, dtype=torch.float32).cpu()
    if rewards.shape != (count,):
        raise UserError(
            f"The reward {name!r} returned {tuple(rewards.shape)} values for {count} answers. "
            "Return one number per answer."
        )
    if not rewards.isfinite().all():
        bad = int((~rewards.isfinite()).nonzero()[0])
        raise UserError(
            f"The reward {name!r} of answer {bad} is {rewards[bad]}. A reward must be a finite number."
        )
    return rewards
