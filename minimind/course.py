"""The whole course in one go: every stage on the built-in data, and the report card.

`out/course/report.json` holds the figures, `report.md` a readable page, `report.png` the picture.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from minimind.baselines import nearest_answers, text_baselines
from minimind.checkpoint import find_weight, load, load_sidecar, write_atomically
from minimind.config import CONFIGS, data_samples, stage_config
from minimind.data import check_conversation, check_text, read_jsonl
from minimind.errors import UserError
from minimind.evaluate import (
    HARD_FROM,
    MEASURES,
    Answer,
    Measure,
    answers,
    best_of,
    by_kind,
    heldout_pair_logps,
    heldout_problems,
    kl_per_token,
    measure_distill,
    most_common_answer,
    preference_rows,
    reasoning_measures,
    samples,
    share_right,
)
from minimind.generate import chat
from minimind.model import MiniMind
from minimind.rewards import answer_of
from minimind.stages.dpo import SIDES, as_messages
from minimind.stages.reason import check_reasoning
from minimind.tokenizer import Tokenizer
from minimind.trainer import TrainResult, starting_point, train

STAGES_IN_ORDER = tuple(stage for stage in CONFIGS if stage in MEASURES)
QUESTIONS = ("Hello!", "What is 17+8?")
LIMIT_OF_TINY = (
    24  # held-out examples per measure in the tiny preset, which only proves that it runs
)


def load_or_train(weight: str, preset: str = "course") -> tuple[MiniMind, Tokenizer]:
    """Return the model and tokenizer of a stage's weight, training it (and what it needs) if absent.

    Args:
        weight: "pretrain" or "full_sft", the name under which a stage saves its weight.
        preset: whose folder to look in.
    """
    for stage in STAGES_IN_ORDER:
        config = stage_config(stage, preset)
        if config.save_weight == weight:
            break
    else:
        raise UserError(f"No stage saves a weight called {weight!r}.")
    try:
        find_weight(weight, config.out_dir)
    except UserError:
        if config.from_weight != "none":
            load_or_train(config.from_weight, preset)
        train(stage, preset)
    return load(weight, config.out_dir)


def course(preset: str = "course", seed: int = 42, out_dir: str | None = None) -> dict:
    """Train every stage in order, measure each before and after, and write the report card.

    Returns:
        The report: `{"total_seconds", "stages": [{"stage", "seconds", "measures": {name: {"before",
        "after", "baseline", "better", "held_out_examples"}}, "samples"}], "chat"}`.
    """
    out_dir = out_dir or stage_config("pretrain", preset).out_dir
    started = time.monotonic()
    report: dict = {"preset": preset, "seed": seed, "total_seconds": 0.0, "stages": []}
    for stage in STAGES_IN_ORDER:
        report["stages"].append(run_stage(stage, preset, seed, out_dir))
    report["chat"] = sample_chat(out_dir)
    report["total_seconds"] = round(time.monotonic() - started, 1)
    write_report(report, Path(out_dir))
    return report


def run_stage(stage: str, preset: str, seed: int, out_dir: str) -> dict:
    """Measure, train, measure again; return the stage's part of the report."""
    started = time.monotonic()
    limit = LIMIT_OF_TINY if preset == "tiny" else None
    config = stage_config(stage, preset, seed=seed, out_dir=out_dir)
    model, tokenizer, _ = starting_point(config)
    before, _ = MEASURES[stage](model, tokenizer, limit)
    result = train(stage, preset, seed=seed, out_dir=out_dir)
    after, found = MEASURES[stage](result.model, tokenizer, limit)
    measures = {
        name: {**asdict(measure), "before": before[name].value, "after": measure.value}
        for name, measure in after.items()
    }
    run = {"preset": preset, "seed": seed, "out_dir": out_dir}
    BASELINES[stage](measures, found, tokenizer, run)
    for measure in measures.values():
        del measure["value"]
    return {
        "stage": stage,
        "seconds": round(time.monotonic() - started, 1),
        "training_seconds": result.metrics["seconds"],
        "measures": measures,
        "samples": samples(found),
        "history": result.history,
    }


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


def distill_baselines(
    measures: dict, found: Sequence[Answer], tokenizer: Tokenizer, run: dict
) -> None:
    """The same student without a teacher: cross-entropy alone, the same start and steps.

    What it is before its first step (the teacher with layers left out) is "before".
    """
    limit = LIMIT_OF_TINY if run["preset"] == "tiny" else None
    start: dict[str, Measure] = {}

    def first(step: int, model: MiniMind) -> None:
        if step == 0:
            start.update(measure_distill(model, tokenizer, limit)[0])
            model.train()

    alone = train("distill", alpha=1.0, save_weight="full_dist_alone", callback=first, **run)
    end, _ = measure_distill(alone.model, tokenizer, limit)
    for name, measure in measures.items():
        measure.update(before=start[name].value, baseline=end[name].value)


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


def reason_baselines(
    measures: dict, found: Sequence[Answer], tokenizer: Tokenizer, run: dict
) -> None:
    """The same start trained as long to answer at once; beside it, the commonest number always said."""
    direct = train_direct(**run).model
    rows = [question_and_answer(answer.question, answer.expected, answer.kind) for answer in found]
    guesses = [replace(a, answer=most_common_number(group)) for group in by_kind(found).values()
               for a in group]  # fmt: skip
    baselines = {
        "direct": reasoning_measures(answers(direct, tokenizer, rows), tokenizer),
        "constant": reasoning_measures(guesses, tokenizer),
    }
    for name, measure in measures.items():
        measure["baselines"] = {who: scores[name].value for who, scores in baselines.items()}
        measure["baseline"] = measure["baselines"]["direct"]


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
        from_weight=config.from_weight, save_weight="reason_direct", epochs=config.epochs,
        batch_size=config.batch_size, learning_rate=DIRECT_LEARNING_RATE,
    )  # fmt: skip


# Each adds "baseline" to its stage's measures; `run` (preset, seed, out_dir) trains what a comparison needs.
BASELINES = {
    "pretrain": pretrain_baselines, "sft": sft_baselines, "lora": lora_baselines,
    "distill": distill_baselines,
    "dpo": dpo_baselines,
    "reward": reward_baselines,
    "grpo": partial(rl_baselines, "grpo"), "spo": partial(rl_baselines, "spo"),
    "reason": reason_baselines,
}  # fmt: skip


def sample_chat(out_dir: str) -> list[dict]:
    """Ask the weights of the course a few things, among them what none was trained to answer."""

    def first(name: str, kind: str) -> str:
        rows = read_jsonl(data_samples(name), check_conversation)
        return next(row["conversations"][0]["content"] for row in rows if row["kind"] == kind)

    unseen = first("sft_heldout.jsonl", "person_unseen")
    asked = [("full_sft", question) for question in (*QUESTIONS, unseen)]
    asked += [("lora", first("lora_heldout.jsonl", "name")), ("dpo", unseen)]
    asked += [(weight, first("grpo_heldout.jsonl", "7")) for weight in ("reason", "grpo")]
    turns = []
    for weight, question in asked:
        message = {"role": "user", "content": question}
        answer = chat(*load(weight, out_dir), [message], max_new_tokens=80)
        turns.append({"weight": weight, "user": question, "assistant": answer})
    return turns


BASELINES_TEXT = """Baselines. Bits per byte: a 5-gram model. Facts: the commonest answer. Exact match and persona: the
answer to the most similar training question. DPO: for preferences the better of "shorter" and "longer", else the value
before; for KL what the cheapest way to speak so would cost. Reasoning: the same weight trained as long to answer
without a thought. Distillation: the same student trained as long without a teacher. GRPO and SPO: the commonest result
of each length; for lengths and KL the value before."""


def report_text(report: dict) -> str:
    """Return the report card as Markdown: one table, samples, a chat."""
    lines = [f"# Report card ({report['preset']} preset, seed {report['seed']})", "",
             f"Whole course: {report['total_seconds']:.0f} s on this machine.", "",
             "| stage | seconds | held-out measure | before | after | baseline | better | examples |",
             "|---|--:|---|--:|--:|--:|---|--:|"]  # fmt: skip
    for stage in report["stages"]:
        for name, m in stage["measures"].items():
            lines.append(
                f"| {stage['stage']} | {stage['seconds']:.0f} | {name} | {m['before']:.3f} | **{m['after']:.3f}** "
                f"| {m['baseline']:.3f} | {m['better']} | {m['held_out_examples']} |"
            )
    text = report["stages"][0]["measures"]["bits_per_byte"]
    lines += ["", f"Bits per byte of held-out text: {text['after']:.3f}; "
              + ", ".join(f"{name} {value:.3f}" for name, value in text["baselines"].items())
              + f". That is {text['after'] / text['baseline']:.2f} of the 5-gram's.",
              BASELINES_TEXT]  # fmt: skip
    lines += ["", "![before and after](report.png)", "", "## Chat", ""]
    lines += [
        f"> `{t['weight']}` **{t['user']}**  \n> `{t['assistant']}`\n" for t in report["chat"]
    ]
    for stage in report["stages"]:
        lines += [f"## Samples of {stage['stage']}", ""]
        lines += [
            f"- {'✓' if s['right'] else '✗'} {s['question']} → {s['answer'].strip()}"
            for s in stage["samples"]
        ]
        lines.append("")
    return "\n".join(lines)


def write_report(report: dict, folder: Path) -> None:
    """Write report.json, report.md and, where matplotlib is installed, report.png."""
    files = {
        "report.json": json.dumps(report, indent=1, ensure_ascii=False),
        "report.md": report_text(report),
    }
    for name, text in files.items():
        write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))
    try:
        from minimind.plots import before_after
    except ImportError:
        return
    figure = before_after(report)
    write_atomically(
        folder / "report.png", lambda file: figure.savefig(file, format="png", dpi=120)
    )
