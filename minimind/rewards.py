"""What an answer is worth: small functions of text, put together by name and weight.

A reward sees the problem (a row of the RL data) and the text that the model wrote. What can be
checked is checked; what cannot is judged by a learned reward model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minimind.errors import UserError, bad_value, needed
from minimind.tokenizer import TAGS, Message

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


Row = dict  # {"conversations": […, an empty assistant turn], perhaps "answer"}
Scorer = Callable[[Sequence[list[Message]]], Tensor]  # whole conversations to scores (N,)
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


class LearnedReward:
    """A reward model's score of the answers that nothing else can verify, clipped to ±3.

    With `reasoning`, an answer that has an <answer> counts 0.4 as a whole and 0.6 by what stands
    in it (the guide's mixture). Rows that have an "answer" get 0: they are checked, not judged.
    """

    __name__ = "reward_model"

    def __init__(self, score: Scorer, reasoning: bool = False) -> None:
        self.score, self.reasoning = score, reasoning

    def __call__(self, rows: Sequence[Row], texts: Sequence[str]) -> Tensor:
        rewards = torch.zeros(len(texts))
        judged = [i for i, row in enumerate(rows) if "answer" not in row]
        rewards[judged] = self._clipped([rows[i] for i in judged], [texts[i] for i in judged])
        if self.reasoning:
            found = [i for i in judged if answer_of(texts[i]) is not None]
            inner = self._clipped([rows[i] for i in found], [answer_of(texts[i]) for i in found])
            rewards[found] = 0.4 * rewards[found] + 0.6 * inner
        return rewards

    def _clipped(self, rows: Sequence[Row], texts: Sequence[str]) -> Tensor:
        if not rows:
            return torch.zeros(0)
        conversations = [
            [*row["conversations"][:-1], {"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ]
        return checked(self.score(conversations), len(rows), self.__name__).clamp(*SPAN_OF_A_MODEL)


def folder_scorer(
    folder: str | Path, allow_remote_code: bool = False, device: torch.device | str = "cpu"
) -> Scorer:
    """Load a reward model from a Hugging Face folder, of either kind that is in use.

    - A model with `get_score(tokenizer, conversation)`, such as InternLM2-reward: its folder holds
      code of its own, which is run only if `allow_remote_code`.
    - Sequence classification with one label: the logit is the score.

    Raises:
        UserError: no such folder, code that was not allowed, another kind of model, or one that
            transformers cannot load.
    """
    config = _read_config(Path(folder))
    kind = _kind_of(config, folder)
    remote = kind in config.get("auto_map", {})
    if remote and not allow_remote_code:
        code = ", ".join(sorted(p.name for p in Path(folder).glob("*.py"))) or "remote"
        raise UserError(
            f"{folder} brings code of its own ({code}), which would run with your rights. Read it, "
            "and if you trust it, give allow_remote_code=1."
        )
    transformers = needed("transformers", "test")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
        model = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=remote)
    except Exception as error:  # whatever a stranger's folder may raise
        raise UserError(
            f"{folder} cannot be loaded ({type(error).__name__}: {str(error)[:300]})."
        ) from error
    model = model.to(device).eval().requires_grad_(False)
    return _get_score(model, tokenizer, folder) if kind == "AutoModel" else _logit(model, tokenizer)


def _read_config(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        there = ", ".join(sorted(p.name for p in folder.glob("*"))[:8]) or "nothing"
        raise UserError(
            f"reward_model_path={folder} is no Hugging Face folder: it has no config.json that can "
            f"be read ({there} there). Give a folder with config.json, weights and tokenizer."
        ) from error


def _kind_of(config: dict, folder: str | Path) -> str:
    """Return the class of transformers that loads the folder."""
    classes = {*config.get("auto_map", {}), *(config.get("architectures") or [])}
    if any(name.endswith("ForSequenceClassification") for name in classes):
        labels = len(config.get("id2label", ())) or config.get("num_labels", 2)
        if labels != 1:
            raise UserError(f"{folder} tells {labels} classes apart; a reward model has 1 label.")
        return "AutoModelForSequenceClassification"
    if "AutoModel" in config.get("auto_map", {}):
        return "AutoModel"
    raise UserError(
        f"{folder} is of an unknown kind ({', '.join(sorted(classes)) or 'no architecture'}). A reward "
        "model is a …ForSequenceClassification with one label, or code with get_score."
    )


def _get_score(model: nn.Module, tokenizer: object, folder: str | Path) -> Scorer:
    if not hasattr(model, "get_score"):
        raise UserError(f"{folder}: {type(model).__name__} has no get_score. It scores nothing.")

    @torch.no_grad()
    def score(conversations: Sequence[list[Message]]) -> Tensor:
        values = [torch.as_tensor(model.get_score(tokenizer, c)).flatten() for c in conversations]
        return torch.cat(values)

    return score


def _logit(model: nn.Module, tokenizer: object) -> Scorer:
    """Score one conversation after the other: without padding no model can get it wrong."""

    @torch.no_grad()
    def score(conversations: Sequence[list[Message]]) -> Tensor:
        found = []
        for conversation in conversations:
            if tokenizer.chat_template:
                text = (tokenizer.apply_chat_template(conversation, tokenize=False),)
            else:  # a judge of question and answer
                text = (
                    "\n".join(m["content"] for m in conversation[:-1]),
                    conversation[-1]["content"],
                )
            inputs = tokenizer(*text, return_tensors="pt", add_special_tokens=len(text) == 2)
            found.append(model(**inputs.to(model.device)).logits.flatten())
        return torch.cat(found)

    return score
