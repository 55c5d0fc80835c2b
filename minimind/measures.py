"""What each stage is judged by: figures on built-in rows that no stage has trained on.

In the order of the course. Each function takes a model and returns its measures by name, and the
answers from which they come; `limit` takes about so many rows, for runs that only prove that it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from minimind.config import data_samples
from minimind.data import check_conversation, check_text, read_jsonl
from minimind.evaluate import (
    BATCH,
    Answer,
    Measure,
    answer_loss,
    answers,
    bits_per_byte,
    by_kind,
    check_fact,
    complete,
    completed_facts,
    pass_at_k,
    share_right,
)
from minimind.generate import generate, sample_rollouts
from minimind.model import MiniMind
from minimind.rewards import answer_of, exact
from minimind.stages.dpo import SIDES, as_messages, check_pair, encode_pair, pair_logps
from minimind.stages.reason import check_reasoning, split_thought
from minimind.stages.reward import add_score, heldout_scores, pair_accuracy, score_conversations
from minimind.stages.rl import check_problem, prompt_ids
from minimind.stages.sft import read_chats
from minimind.tokenizer import Tokenizer


def limit_of(preset: str) -> int | None:
    """Return about how many held-out rows a measure takes: all, or in the tiny preset a few."""
    return 24 if preset == "tiny" else None


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


def sft_answers(model: MiniMind, tokenizer: Tokenizer, limit: int | None = None) -> list[Answer]:
    """Answer the held-out questions of SFT (about `limit` of them, of all kinds)."""
    rows = read_jsonl(data_samples("sft_heldout.jsonl"), check_conversation)
    rows = rows if limit is None else rows[:: max(1, len(rows) // limit)]
    return answers(model.eval(), tokenizer, rows)


def measure_sft(
    model: MiniMind, tokenizer: Tokenizer, limit: int | None = None
) -> tuple[dict, list]:
    """Exact match over all held-out questions, and over each kind."""
    found = sft_answers(model, tokenizer, limit)
    measures = {"exact_match": Measure(share_right(found), "higher", len(found))}
    for kind, group in by_kind(found).items():
        measures[f"exact_match_{kind}"] = Measure(share_right(group), "higher", len(group))
    return measures, found


def measure_lora(
    model: MiniMind, tokenizer: Tokenizer, limit: int | None = None
) -> tuple[dict, list]:
    """The persona on questions that no chat asks, and what is left of SFT's exact match.

    `persona` asks for the whole answer: the right fact, then the signature. `persona_signed` looks
    at the last sentence alone. The adapter signs whatever it is asked, and should; so
    `sft_exact_match` takes a signature off an answer before it compares.
    """
    rows = read_jsonl(data_samples("lora_heldout.jsonl"), check_conversation)[:limit]
    found = answers(model.eval(), tokenizer, rows)
    manner = " " + found[0].expected.rsplit(". ", 1)[-1]
    signed = sum(answer.answer.strip().endswith(manner) for answer in found)
    chats = [
        replace(chat, answer=chat.answer.strip().removesuffix(manner))
        for chat in sft_answers(model, tokenizer, limit)
    ]
    measures = {
        "persona": Measure(share_right(found), "higher", len(found)),
        "persona_signed": Measure(signed / len(found), "higher", len(found)),
        "sft_exact_match": Measure(share_right(chats), "higher", len(chats)),
    }
    return measures, found


def split_manner(text: str) -> tuple[str, str]:
    """Split an answer of the built-in pairs into what is said and how it is closed.

    >>> split_manner("The pet of Quin is cat. Have a lovely day.")
    ('The pet of Quin is cat.', 'Have a lovely day.')
    """
    said, stop, closing = text.strip().partition(". ")
    return said + stop.strip(), closing


def preference_rows(limit: int | None = None) -> list[dict]:
    """Return the held-out pairs."""
    return read_jsonl(data_samples("dpo_heldout.jsonl"), check_pair)[:limit]


def heldout_pair_logps(model: MiniMind, tokenizer: Tokenizer, rows: Sequence[dict]) -> torch.Tensor:
    """Return the log-probability of the chosen and the rejected answer of every row, (N, 2)."""
    room = model.config.max_position_embeddings
    pairs = [encode_pair(tokenizer, row, room) for row in rows]
    return pair_logps(model, pairs, tokenizer.pad_id)


def sampled_answers(
    model: MiniMind, tokenizer: Tokenizer, rows: Sequence[dict], seed: int = 0
) -> list[Answer]:
    """Sample one answer per pair at temperature 1. Expected: the chosen one, in any kind manner."""
    sides = [[as_messages(row, side) for row in rows] for side in ("chosen", "rejected")]
    prompts = [tokenizer.encode_chat(messages[:-1], True) for messages in sides[0]]
    texts = [
        tokenizer.decode(ids)
        for start in range(0, len(prompts), BATCH)
        for ids in generate(model, prompts[start : start + BATCH], 48, eos_id=tokenizer.eos_id,
                            seed=seed + start)
    ]  # fmt: skip
    preferred = {split_manner(messages[-1]["content"])[1] for messages in sides[0]}
    found = []
    for messages, text in zip(sides[0], texts, strict=True):
        said, closing = split_manner(messages[-1]["content"])
        manner = split_manner(text)[1]
        kind = "preferred manner" if manner in preferred else "another manner"
        expected = f"{said} {manner if manner in preferred else closing}"
        found.append(Answer(messages[-2]["content"], expected, text, kind))
    return found


def without_closing(answer: Answer, closings: set[str]) -> Answer:
    """Return the answer without the closing sentence, if it ends in one of `closings`."""
    said, manner = split_manner(answer.answer)
    return replace(answer, answer=said) if manner in closings else answer


def chats_kept(model: MiniMind, tokenizer: Tokenizer, limit: int | None = None) -> Measure:
    """SFT's exact match, with the closings that pairs of manners taught taken off the answers."""
    closings = {split_manner(as_messages(row, side)[-1]["content"])[1]
                for row in preference_rows() for side in SIDES} - {""}  # fmt: skip
    chats = [without_closing(answer, closings) for answer in sft_answers(model, tokenizer, limit)]
    return Measure(share_right(chats), "higher", len(chats))


def measure_dpo(
    model: MiniMind, tokenizer: Tokenizer, limit: int | None = None
) -> tuple[dict, list]:
    """What a model prefers and how it speaks, and what is left of SFT's exact match.

    `prefers_chosen`: share of held-out pairs whose chosen answer has the higher log-probability.
    `preferred_manner`: share of answers sampled at temperature 1 that close in a preferred way;
    `preferred_and_right`: and say the right thing. `sft_exact_match`: greedy answers to the
    questions of SFT, closings of either manner taken off, since pairs taught to add them.
    """
    rows = preference_rows(limit)
    chosen, rejected = heldout_pair_logps(model.eval(), tokenizer, rows).T
    found = sampled_answers(model, tokenizer, rows)
    spoken = len(by_kind(found).get("preferred manner", [])) / len(found)
    measures = {
        "prefers_chosen": Measure(float((chosen > rejected).float().mean()), "higher", len(rows)),
        "preferred_manner": Measure(spoken, "higher", len(found)),
        "preferred_and_right": Measure(share_right(found), "higher", len(found)),
        "sft_exact_match": chats_kept(model, tokenizer, limit),
    }
    return measures, found


def measure_reward(
    model: MiniMind, tokenizer: Tokenizer, limit: int | None = None
) -> tuple[dict, list]:
    """Held-out pairs in which the chosen answer has the higher score; a tie is half right."""
    rows = preference_rows(limit)
    room = model.config.max_position_embeddings
    pairs = [encode_pair(tokenizer, row, room) for row in rows]
    chosen, rejected = heldout_scores(add_score(model.eval()), pairs, tokenizer.pad_id)
    answers_of = [{side: as_messages(row, side)[-1]["content"] for side in SIDES} for row in rows]
    found = [
        Answer(as_messages(row, "chosen")[-2]["content"], said["chosen"],
               said["chosen" if better else "rejected"], "the answer with the higher score")
        for row, said, better in zip(rows, answers_of, (chosen > rejected).tolist(), strict=True)
    ]  # fmt: skip
    accuracy = float(pair_accuracy(chosen, rejected))
    return {"pair_accuracy": Measure(accuracy, "higher", len(rows))}, found


def best_of(
    judge: MiniMind, sampler: MiniMind, tokenizer: Tokenizer, rows: Sequence[dict], k: int = 8
) -> tuple[float, float]:
    """Sample k answers to the question of every pair; return how many close in the preferred manner.

    Returns:
        the share among those with the best score of their k, and among all, which is what picking
        at random gives on average.
    """
    drawn = [sampled_answers(sampler, tokenizer, rows, seed=i * len(rows)) for i in range(k)]
    preferred = torch.tensor([[a.kind == "preferred manner" for a in some] for some in drawn])
    scores = torch.stack([
        score_conversations(judge, tokenizer, [
            [*as_messages(row, "chosen")[:-1], {"role": "assistant", "content": answer.answer}]
            for row, answer in zip(rows, some, strict=True)
        ]) for some in drawn
    ])  # fmt: skip
    best = preferred.gather(0, scores.argmax(0, keepdim=True))  # (k, N) to (1, N)
    return float(best.float().mean()), float(preferred.float().mean())


TRAINED_OPERATIONS = ("2", "3", "4", "5")  # most chains in reason.jsonl; the longer ones are few


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
    """Form, number and thought of greedy answers to the held-out chains; what is left of chatting."""
    found = reasoning_answers(model, tokenizer, limit)
    measures = reasoning_measures(found, tokenizer)
    return {**measures, "sft_exact_match": chats_kept(model, tokenizer, limit)}, found


HARD_FROM = 6  # operations of a chain; problems with fewer are called easy


SAMPLES = 8  # answers sampled to each hard problem; easy ones, solved nearly always, get 2


THOUGHT = 80  # tokens that an answer with its thought may have


def heldout_problems(limit: int | None = None) -> tuple[list[dict], list[dict]]:
    """Return the held-out problems (about `limit` of them), the easy and the hard ones."""
    rows = read_jsonl(data_samples("grpo_heldout.jsonl"), check_problem)
    rows = rows if limit is None else rows[:: max(1, len(rows) // limit)]
    hard = [row for row in rows if int(row["kind"]) >= HARD_FROM]
    return [row for row in rows if row not in hard], hard


def solve(
    model: MiniMind, tokenizer: Tokenizer, rows: Sequence[dict], generations: int = 1, seed: int = 0
) -> tuple[list[list[bool]], float]:
    """Sample answers to every problem at temperature 1.

    Returns:
        for every row `generations` verdicts, right or wrong; and the tokens of a mean answer.
    """
    verdicts, tokens = [], 0
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        prompts = [prompt_ids(row, tokenizer) for row in part]
        sampled = sample_rollouts(
            model, prompts, generations, THOUGHT, tokenizer.eos_id, seed=seed + start
        )
        tokens += sum(len(completion) for completion in sampled.completions)
        for i, row in enumerate(part):
            group = sampled.completions[i * generations : (i + 1) * generations]
            verdicts.append([exact(tokenizer.decode(ids), row["answer"]) == 1 for ids in group])
    return verdicts, tokens / (len(rows) * generations)


def solve_greedily(model: MiniMind, tokenizer: Tokenizer, rows: Sequence[dict]) -> list[Answer]:
    """Answer every problem with the most likely token at each step."""
    prompts = [prompt_ids(row, tokenizer) for row in rows]
    texts = [tokenizer.decode(i) for i in complete(model, prompts, THOUGHT, tokenizer.eos_id)]
    return [
        Answer(row["conversations"][-2]["content"], row["answer"], text, row.get("kind", ""))
        for row, text in zip(rows, texts, strict=True)
    ]


def measure_rl(
    model: MiniMind, tokenizer: Tokenizer, limit: int | None = None
) -> tuple[dict, list]:
    """Held-out problems, hard and easy apart: right when sampled at temperature 1, and greedily.

    Also, for the hard ones, pass@8 and the tokens of a mean answer.
    """
    easy, hard = heldout_problems(limit)
    model.eval()
    hits, tokens = solve(model, tokenizer, hard, SAMPLES)
    easy_hits, _ = solve(model, tokenizer, easy, 2)
    found, easy_found = (solve_greedily(model, tokenizer, rows) for rows in (hard, easy))
    passed = [pass_at_k(SAMPLES, sum(row), SAMPLES) for row in hits]
    shares = {
        "sampled_hard": (sum(map(sum, hits)) / (SAMPLES * len(hard)), hard),
        "greedy_hard": (share_right(found), hard),
        "pass_at_8_hard": (sum(passed) / len(hard), hard),
        "sampled_easy": (sum(map(sum, easy_hits)) / (2 * len(easy)), easy),
        "greedy_easy": (share_right(easy_found), easy),
    }
    measures = {name: Measure(v, "higher", len(rows)) for name, (v, rows) in shares.items()}
    measures["tokens_hard"] = Measure(tokens, "lower", len(hard))
    return measures, easy_found + found


@torch.no_grad()
def kl_per_token(
    model: MiniMind, reference: MiniMind, tokenizer: Tokenizer, rows: Sequence[dict], seed: int = 0
) -> float:
    """Return KL(model ‖ reference) in nats per token, on answers that the model samples.

    Not an estimate from the sampled tokens: at every position the sum over the vocabulary.
    """
    total = tokens = 0.0
    for start in range(0, len(rows), BATCH):
        prompts = [prompt_ids(row, tokenizer) for row in rows[start : start + BATCH]]
        sampled = sample_rollouts(model, prompts, 1, THOUGHT, tokenizer.eos_id, seed=seed + start)
        mask = sampled.mask[:, 1:]  # of the token that is guessed
        p, q = (
            m(sampled.input_ids)[:, :-1][mask].float().log_softmax(-1) for m in (model, reference)
        )
        total += float((p.exp() * (p - q)).sum())
        tokens += int(mask.sum())
    return total / tokens


def measure_distill(
    model: MiniMind, tokenizer: Tokenizer, limit: int | None = None
) -> tuple[dict, list]:
    """Cross-entropy of the held-out answers and exact match of the student's own."""
    path = data_samples("distill_heldout.jsonl")
    rows = read_jsonl(path, check_conversation)
    examples = read_chats(path, tokenizer, model.config.max_position_embeddings)
    step = 1 if limit is None else max(1, len(rows) // limit)
    found = answers(model.eval(), tokenizer, rows[::step])
    loss = answer_loss(model, tokenizer, examples[::step])
    measures = {
        "heldout_loss": Measure(loss, "lower", len(found)),
        "exact_match": Measure(share_right(found), "higher", len(found)),
    }
    return measures, found


MEASURES = {
    "pretrain": measure_pretrain, "sft": measure_sft, "lora": measure_lora, "dpo": measure_dpo, "reward": measure_reward,
    "reason": measure_reason, "grpo": measure_rl, "spo": measure_rl, "distill": measure_distill,
}  # fmt: skip
