"""What an answer is worth: small functions of text, put together by name and weight.

A reward sees the problem (a row of the RL data) and the text that the model wrote. What can be
checked is checked; what cannot is judged by a learned reward model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from math import inf
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


def repetition_reward(text: str, n: int = 8) -> float:
    """Minus the share of n characters in a row that stood in the text before: 0 to almost -1.

    Characters, not words: a calculation has no spaces between its steps, nor has Chinese.
    """
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


Row = dict  # {"conversations": […, an empty assistant turn], perhaps "answer"}
Scorer = Callable[[Sequence[list[Message]]], Tensor]  # whole conversations to scores (N,)
Reward = Callable[[Sequence[Row], Sequence[str]], Tensor]

REWARDS: dict[str, Callable[[Row, str], float]] = {
    "exact": lambda row, text: exact(text, row["answer"]) if "answer" in row else 0.0,
    "format": lambda row, text: format_reward(text),
    "tags": lambda row, text: tag_count_reward(text),
    "length": lambda row, text: length_reward(text),
    "repetition": lambda row, text: repetition_reward(text),
}  # `minimind grpo` and `spo` take those that `make_reward` names; the others are for loops of your own

SPANS = {  # the lowest and the highest; scores of a reward model are clipped to theirs
    "exact": (0, 1), "format": (0, 0.5), "tags": (0, 1), "length": (-1, 0), "repetition": (-1, 0),
    "reward_model": (-3, 3),
}  # fmt: skip
SPAN_OF_OTHERS = (0, 1)


class Rewards:
    """Several rewards, added up with weights: `Rewards([("exact", 1.0), ("format", 0.5)])`.

    A part is (name, weight) with a name in `REWARDS`, or (name, weight, function), where the
    function (rows, texts) -> (N,) gives 0 to 1; a "reward_model" may give -3 to 3. Calling it
    returns the totals (N,) and the parts, name to (N,), unweighted.

    Raises:
        UserError: an unknown name, or one given twice; a part that returns the wrong number of
            rewards, a NaN, or one outside its span.
    """

    def __init__(self, parts: Sequence[tuple[str, float] | tuple[str, float, Reward]]) -> None:
        self.parts: dict[str, tuple[float, Reward]] = {}
        for name, weight, *given in parts:
            if name in self.parts:
                raise UserError(f"Two parts of the reward are called {name!r}. Name them apart.")
            if not given and name not in REWARDS:
                raise bad_value("reward", name, REWARDS)
            self.parts[name] = weight, given[0] if given else _for_all(REWARDS[name])

    def __call__(
        self, rows: Sequence[Row], texts: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        found = {
            name: checked(reward(rows, texts), len(texts), name, SPANS.get(name, SPAN_OF_OTHERS))
            for name, (_, reward) in self.parts.items()
        }
        total = torch.zeros(len(texts))
        for name, (weight, _) in self.parts.items():
            total += weight * found[name]
        return total, found

    def spans(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest total that each row can get, both (N,).

        What can be verified is not judged by a model, and the other way round.
        """
        ends = []
        for row in rows:
            silent = "reward_model" if "answer" in row else "exact"
            parts = [(w, SPANS.get(n, SPAN_OF_OTHERS)) for n, (w, _) in self.parts.items() if n != silent]  # fmt: skip
            ends.append([sum(pick(w * end for end in span) for w, span in parts) for pick in (min, max)])  # fmt: skip
        low, high = torch.tensor(ends, dtype=torch.float32).T
        return low, high


def _for_all(reward: Callable[[Row, str], float]) -> Reward:
    return lambda rows, texts: torch.tensor(
        [reward(row, text) for row, text in zip(rows, texts, strict=True)]
    )


def checked(values: object, count: int, name: str, span: Sequence[float] = (-inf, inf)) -> Tensor:
    """Return `count` rewards as float32.

    UserError if there are more or fewer, one is NaN, or one lies outside the span.
    """
    rewards = torch.as_tensor(values, dtype=torch.float32).cpu()
    if rewards.shape != (count,):
        raise UserError(
            f"The reward {name!r} returned {tuple(rewards.shape)} values for {count} answers. "
            "Return one number per answer."
        )
    low, high = span
    fine = rewards.isfinite() & (rewards >= low) & (rewards <= high)
    if not fine.all():
        bad = int((~fine).nonzero()[0])
        raise UserError(
            f"The reward {name!r} of answer {bad} is {rewards[bad]:g}. It must be a finite number from "
            f"{low} to {high}; what it counts for is said by its weight."
        )
    return rewards


class LearnedReward:
    """A reward model's score of the answers that nothing else can verify, clipped to ±3.

    With `reasoning`, an answer that has an <answer> counts 0.4 as a whole and 0.6 by what stands
    in it (the guide's mixture). Rows that have an "answer" get 0: they are checked, not judged.
    """

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
        return checked(self.score(conversations), len(rows), "reward_model").clamp(
            *SPANS["reward_model"]
        )


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
