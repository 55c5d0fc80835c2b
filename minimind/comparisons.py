"""What a stage must beat: for every measure a simpler way to the same end.

Each function adds "baseline" to its stage's measures. `run` (preset, seed, out_dir) is what a
comparison needs to train another model for as long.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from minimind.baselines import nearest_answers, text_baselines
from minimind.checkpoint import find_weight, load, load_sidecar, write_atomically
from minimind.config import data_samples, stage_config
from minimind.data import check_conversation, check_text, read_jsonl
from minimind.evaluate import (
    Answer,
    answers,
    by_kind,
    most_common_answer,
    share_right,
)
from minimind.measures import (
    HARD_FROM,
    best_of,
    heldout_pair_logps,
    heldout_problems,
    kl_per_token,
    limit_of,
    measure_distill,
    preference_rows,
    reasoning_measures,
)
from minimind.rewards import answer_of
from minimind.stages.dpo import SIDES, as_messages
from minimind.stages.reason import check_reasoning
from minimind.tokenizer import Tokenizer
from minimind.trainer import TrainResult, train


def pretrain_baselines(
    measures: dict, found: Sequence[Answer], tokenizer: Tokenizer, run: dict
) -> None:
    """Text: unigram, 5-gram and gzip (the 5-gram is the one to beat). Facts: the commonest answer."""
    texts = {
        name: [row["text"] for row in read_jsonl(data_samples(f"{name}.jsonl"), check_text)]
        for name in ("pretrain", "pretrain_heldout")
    }
    heldout = texts["pretrain_heldout"][: measures["bits_per_byte"]["held_out_examples"]]
    scores = text_baselines(texts["pretrain"], heldout, tokenizer)
    measures["bits_per_byte"].update(baseline=scores["5-gram"], baselines=scores)
    measures["facts_completed"]["baseline"] = most_common_answer(found)


def sft_baselines(measures: dict, found: Sequence[Answer], tokenizer: Tokenizer, run: dict) -> None:
    """The answer to the most similar training question: what a lookup table would say."""
    looked_up = look_up("sft", found, tokenizer)
    for name, measure in measures.items():
        kind = name.removeprefix("exact_match").lstrip("_")
        right = [a.right for a in looked_up if kind in ("", a.kind)]
        measure["baseline"] = sum(right) / len(right)


def look_up(stage: str, found: Sequence[Answer], tokenizer: Tokenizer) -> list[Answer]:
    """Answer the questions of `found` with the answer to the most similar one in a stage's data."""
    pairs = [
        (question["content"], answer["content"])
        for row in read_jsonl(data_samples(f"{stage}.jsonl"), check_conversation)
        for question, answer in zip(row["conversations"], row["conversations"][1:], strict=False)
        if answer["role"] == "assistant"
    ]
    guesses = nearest_answers(pairs, [answer.question for answer in found], tokenizer)
    return [replace(a, answer=guess) for a, guess in zip(found, guesses, strict=True)]


def lora_baselines(
    measures: dict, found: Sequence[Answer], tokenizer: Tokenizer, run: dict
) -> None:
    """Persona: what a lookup table would say (it always signs). SFT's match: what it was before.

    Adds `weights_trained`, the share of the model's numbers that were trained; SFT trains all.
    """
    measures["persona"]["baseline"] = share_right(look_up("lora", found, tokenizer))
    measures["persona_signed"]["baseline"] = 1.0
    measures["sft_exact_match"]["baseline"] = measures["sft_exact_match"]["before"]
    share = load_sidecar(find_weight("lora", run["out_dir"]))["lora"]["trained_share"]
    measures["weights_trained"] = {
        "value": share, "before": 1.0, "after": share, "baseline": 1.0, "better": "lower",
        "held_out_examples": len(found),
    }  # fmt: skip


def dpo_baselines(measures: dict, found: Sequence[Answer], tokenizer: Tokenizer, run: dict) -> None:
    """Preferences: a rule that only looks at length. The others: what they were before.

    Adds the measures that need the reference: `preference_accuracy`, the share of held-out pairs
    with a margin above 0 (before: `prefers_chosen`, since a margin against oneself is 0), and
    `kl_to_reference` in nats per sampled answer, whose baseline is the cheapest that there is: the
    reference, given that it speaks in the preferred manner, is ln(1/p) away.
    """
    rows = preference_rows(len(found))
    spoken = [{"prompt": a.question, "chosen": a.answer, "rejected": ""} for a in found]
    policy, reference = (load(weight, run["out_dir"])[0] for weight in ("dpo", "full_sft"))
    (chosen, rejected), (sampled, _) = (
        (heldout_pair_logps(policy, tokenizer, some) - heldout_pair_logps(reference, tokenizer, some)).T
        for some in (rows, spoken)
    )  # fmt: skip
    accuracy, n = float((chosen > rejected).float().mean()), len(rows)
    measures["preference_accuracy"] = {
        **measures["prefers_chosen"], "value": accuracy, "after": accuracy,
    }  # fmt: skip
    kl, before = float(sampled.mean()), measures["preferred_manner"]["before"]
    measures["kl_to_reference"] = {
        "value": kl, "before": 0.0, "after": kl, "better": "lower", "held_out_examples": n,
    }  # fmt: skip
    for measure in measures.values():
        measure["baseline"] = measure["before"]
    measures["kl_to_reference"]["baseline"] = -math.log(max(before, 1 / n))
    for name in ("prefers_chosen", "preference_accuracy"):
        measures[name]["baseline"] = by_length(rows, tokenizer)


def reward_baselines(
    measures: dict, found: Sequence[Answer], tokenizer: Tokenizer, run: dict
) -> None:
    """Pairs: a rule that only looks at length. Adds best-of-8: of the SFT model's answers the one
    with the best score, beside one picked at random."""
    rows = preference_rows(len(found))
    judge, sampler = (load(weight, run["out_dir"])[0] for weight in ("reward", "full_sft"))
    best, random = best_of(judge, sampler, tokenizer, rows)
    measures["pair_accuracy"]["baseline"] = by_length(rows, tokenizer)
    measures["best_of_8_preferred"] = {
        "value": best, "before": random, "after": best, "baseline": random, "better": "higher",
        "held_out_examples": len(rows),
    }  # fmt: skip


def by_length(rows: Sequence[dict], tokenizer: Tokenizer) -> float:
    """Return the share of pairs that "the shorter is better", or its opposite, gets right."""
    sizes = [[len(tokenizer.encode(as_messages(row, side)[-1]["content"])) for side in SIDES]
             for row in rows]  # fmt: skip
    shorter = sum(chosen < rejected for chosen, rejected in sizes) / len(rows)
    longer = sum(chosen > rejected for chosen, rejected in sizes) / len(rows)
    return max(shorter, longer)


def reason_baselines(
    measures: dict, found: Sequence[Answer], tokenizer: Tokenizer, run: dict
) -> None:
    """The same start trained as long to answer at once; beside it, the commonest number always said.

    What is left of SFT is compared with what it was before.
    """
    direct = train_direct(**run).model
    rows = [question_and_answer(answer.question, answer.expected, answer.kind) for answer in found]
    guesses = [replace(a, answer=most_common_number(group)) for group in by_kind(found).values()
               for a in group]  # fmt: skip
    baselines = {
        "direct": reasoning_measures(answers(direct, tokenizer, rows), tokenizer),
        "constant": reasoning_measures(guesses, tokenizer),
    }
    for name in baselines["direct"]:
        scores = {who: measured[name].value for who, measured in baselines.items()}
        measures[name].update(baseline=scores["direct"], baselines=scores)
    measures["sft_exact_match"]["baseline"] = measures["sft_exact_match"]["before"]


def question_and_answer(question: str, answer: str, kind: str) -> dict:
    """Return a chat row of one turn."""
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"conversations": messages, "kind": kind}


def most_common_number(found: Sequence[Answer]) -> str:
    """Return the answer that is right most often, in its tags."""
    number = Counter(answer_of(answer.expected) for answer in found).most_common(1)[0][0]
    return f"<answer>{number}</answer>"


DIRECT_LEARNING_RATE = 1e-3


def train_direct(preset: str, seed: int = 42, out_dir: str | None = None) -> TrainResult:
    """Train the start of `reason` on its problems without their thoughts, for as many steps."""
    config = stage_config("reason", preset, seed=seed, **({"out_dir": out_dir} if out_dir else {}))
    rows = read_jsonl(config.data_path, check_reasoning)
    for row in rows:
        message = row["conversations"][-1]
        message["content"] = f"<answer>{answer_of(message['content'])}</answer>"
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path = Path(config.out_dir) / "reason_direct.jsonl"
    write_atomically(path, lambda file: file.write(text.encode()))
    return train(
        "sft", preset, seed=seed, out_dir=config.out_dir, data_path=str(path), eval_data_path="",
        from_weight=config.from_weight, save_weight="reason_direct",
        epochs=config.epochs * (1 + config.chat_share if config.chat_path else 1),  # as many steps
        batch_size=config.batch_size, learning_rate=DIRECT_LEARNING_RATE,
    )  # fmt: skip


def rl_baselines(
    stage: str, measures: dict, found: Sequence[Answer], tokenizer: Tokenizer, run: dict
) -> None:
    """The commonest result of each length, said without a thought. And one more measure: the KL
    divergence, per token, from the weight that the stage started from."""
    config = stage_config(stage, run["preset"], out_dir=run["out_dir"])
    model, start = (
        load(name, run["out_dir"])[0] for name in (config.save_weight, config.from_weight)
    )
    rows = heldout_problems()[1][: measures["greedy_hard"]["held_out_examples"]]
    for name, measure in measures.items():
        hard = name.endswith("hard")
        guessed = most_common_answer([a for a in found if (int(a.kind) >= HARD_FROM) == hard])
        measure["baseline"] = measure["before"] if measure["better"] == "lower" else guessed
    kl = kl_per_token(model, start, tokenizer, rows)
    measures["kl_from_start"] = {"value": kl, "before": 0.0, "after": kl, "baseline": 0.0,
                                 "better": "lower", "held_out_examples": len(rows)}  # fmt: skip


def distill_baselines(
    measures: dict, found: Sequence[Answer], tokenizer: Tokenizer, run: dict
) -> None:
    """The same student without a teacher: cross-entropy alone, the same start and steps."""
    alone = train("distill", alpha=1.0, save_weight="full_dist_alone", **run)
    after, _ = measure_distill(alone.model, tokenizer, limit_of(run["preset"]))
    for name, measure in after.items():
        measures[name]["baseline"] = measure.value


BASELINES = {
    "pretrain": pretrain_baselines, "sft": sft_baselines, "lora": lora_baselines, "dpo": dpo_baselines,
    "reward": reward_baselines, "reason": reason_baselines, "grpo": partial(rl_baselines, "grpo"),
    "spo": partial(rl_baselines, "spo"), "distill": distill_baselines,
}  # fmt: skip

BASELINES_TEXT = """Baselines. Bits per byte: a 5-gram model. Facts: the commonest answer. Exact match and persona: the
answer to the most similar training question. DPO: for preferences the better of "shorter" and "longer", else the value
before; for KL what the cheapest way to speak so would cost. Reasoning: the same weight trained as long to answer
without a thought; for SFT's exact match the value before. Distillation: the same student trained as long without a
teacher. GRPO and SPO: the commonest result of each length; for lengths and KL the value before."""
