"""The whole course in one go: every stage on the built-in data, and the report card.

`out/course/report.json` holds the figures, `report.md` a readable page, `report.png` the picture.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

from minimind.checkpoint import STAGE_OF_WEIGHT, find_weight, load, write_atomically
from minimind.comparisons import BASELINES, BASELINES_TEXT
from minimind.config import CONFIGS, data_samples, stage_config
from minimind.data import check_conversation, read_jsonl
from minimind.errors import UserError
from minimind.evaluate import Measure, samples
from minimind.generate import chat
from minimind.measures import MEASURES, limit_of
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer
from minimind.trainer import starting_tokenizer, train

STAGES_IN_ORDER = tuple(CONFIGS)
QUESTIONS = ("Hello!", "What is 17+8?")

# The rows of the report's picture, and the measure by which each stage reports them.
ABILITIES = {
    "text: bits saved of 8": {"pretrain": "bits_per_byte"},
    "facts, as text": {"pretrain": "facts_completed"},
    "questions": {"sft": "exact_match", **dict.fromkeys(("lora", "dpo", "reason"), "sft_exact_match")},
    "people no chat tells of": {"sft": "exact_match_person_unseen"},
    "persona": {"lora": "persona"},
    "kind and right, sampled": {"dpo": "preferred_and_right"},
    "chains of 2–5 operations": {"reason": "answer", "grpo": "greedy_easy", "spo": "greedy_easy"},
    "chains of 6–7, sampled": {"grpo": "sampled_hard", "spo": "sampled_hard"},
    "questions, a layer less": {"distill": "exact_match"},
}  # fmt: skip


def load_or_train(weight: str, preset: str = "course") -> tuple[MiniMind, Tokenizer]:
    """Return the model and tokenizer of a stage's weight, training it (and what it needs) if absent.

    Args:
        weight: "pretrain" or "full_sft", the name under which a stage saves its weight.
        preset: whose folder to look in.
    """
    if weight not in STAGE_OF_WEIGHT:
        raise UserError(f"No stage saves a weight called {weight!r}.")
    stage = STAGE_OF_WEIGHT[weight]
    config = stage_config(stage, preset)
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
    known: dict = {}
    for stage in STAGES_IN_ORDER:
        report["stages"].append(run_stage(stage, preset, seed, out_dir, known))
    report["chat"] = sample_chat(out_dir)
    report["total_seconds"] = round(time.monotonic() - started, 1)
    write_report(report, Path(out_dir))
    return report


def run_stage(stage: str, preset: str, seed: int, out_dir: str, known: dict | None = None) -> dict:
    """Train a stage, measured before its first step and after its last; return its part of the report.

    Args:
        known: what weights were measured at before; GRPO and SPO start from the same one.
    """
    started = time.monotonic()
    known = {} if known is None else known
    start = CONFIGS[stage].from_weight, MEASURES[stage]
    run = {"preset": preset, "seed": seed, "out_dir": out_dir}
    limit = limit_of(preset)
    before: dict[str, Measure] = {}
    measuring = 0.0

    def measure_first(step: int, model: MiniMind) -> None:
        nonlocal measuring
        if step == 0:
            began = time.monotonic()
            if start not in known:
                tokenizer = starting_tokenizer(stage, stage_config(stage, **run))
                known[start] = MEASURES[stage](model, tokenizer, limit)[0]
                model.train()
            before.update(known[start])
            measuring = time.monotonic() - began

    result = train(stage, callback=measure_first, **run)
    after, found = MEASURES[stage](result.model, result.tokenizer, limit)
    measures = {
        name: {**asdict(measure), "before": before[name].value, "after": measure.value}
        for name, measure in after.items()
    }
    BASELINES[stage](measures, found, result.tokenizer, run)
    for measure in measures.values():
        del measure["value"]
    return {
        "stage": stage,
        "seconds": round(time.monotonic() - started, 1),
        "training_seconds": round(result.metrics["seconds"] - measuring, 1),
        "measures": measures,
        "samples": samples(found),
        "history": result.history,
    }


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
    lines += ["", "![what each stage can do](report.png)", "", "## Chat", ""]
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


def abilities(report: dict) -> dict[str, dict[str, tuple[float, float, bool]]]:
    """Return, by ability and stage, the share, its baseline, and whether that stage raised it.

    What a stage measured before its first step belongs to the stage whose weight it started from.
    Bits per byte count as the share that is saved of a byte's 8.
    """
    found: dict = {name: {} for name in ABILITIES}
    for name, measures in ABILITIES.items():
        for part in report["stages"]:
            stage, start = part["stage"], STAGE_OF_WEIGHT.get(CONFIGS[part["stage"]].from_weight)
            if m := part["measures"].get(measures.get(stage)):
                figures = (m[key] for key in ("before", "after", "baseline"))
                before, after, baseline = (1 - x / 8 if m["better"] == "lower" else x for x in figures)  # fmt: skip
                if start:
                    found[name].setdefault(start, (before, math.nan, False))
                found[name][stage] = (after, baseline, after > before + 0.01)
    return found


def write_report(report: dict, folder: Path) -> None:
    """Write report.json, report.md and, where matplotlib is installed, report.png."""
    files = {
        "report.json": json.dumps(report, indent=1, ensure_ascii=False),
        "report.md": report_text(report),
    }
    for name, text in files.items():
        write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))
    try:
        from minimind.plots import ladder
    except ImportError:
        return
    figure = ladder(abilities(report))
    write_atomically(
        folder / "report.png", lambda file: figure.savefig(file, format="png", dpi=120)
    )
