"""Direct preference optimisation: learn from pairs which of two answers is preferred.

Rows are `{"prompt", "chosen", "rejected"}` as three strings, or `{"chosen", "rejected"}` as two
conversations with the same beginning. The reference is the model before training; its
log-probabilities are two numbers per pair, computed once beforehand, so training holds ONE model.

DPO: arXiv 2305.18290. With `sft_coef` the chosen answer's mean log-likelihood is added to the loss
(RPO, arXiv 2404.19733, eq. 2). Left out: label smoothing and the many other losses on the margin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind import distributed
from minimind.config import DPOConfig
from minimind.data import IGNORED, Batch, check_conversation, pad_batch, read_jsonl
from minimind.errors import UserError
from minimind.losses import token_logps
from minimind.precision import autocast
from minimind.stages.common import batch_logps
from minimind.stages.sft import chat_labels
from minimind.stages.task import Metrics, Task
from minimind.tokenizer import Message, Tokenizer

SIDES = ("chosen", "rejected")
Pair = dict[str, dict[str, list[int]] | list[float]]  # one encoded answer per side; "ref_logps"


def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ln π(answer | prompt) in float32, (B,): the SUM over the labelled tokens.

    The sum and not the mean: the derivation of DPO speaks of the probability of a whole answer.

    Args:
        logits: (B, T, V).
        labels: (B, T), aligned with the input ids; -100 on prompt and padding.
    """
    return token_logps(logits, labels).sum(-1)


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-ln σ(β·[(π_c - ref_c) - (π_r - ref_r)]), mean over pairs (arXiv 2305.18290, eq. 7).

    Args:
        policy_chosen, …, ref_rejected: (B,) log-probabilities of whole answers, in nats.
        beta: what a nat of distance from the reference costs, in units of reward; above 0.

    Returns:
        (loss, chosen rewards (B,), rejected rewards (B,)); a reward is β·(ln π - ln π_ref), without
        gradient. The loss is ln 2 where the policy is the reference.
    """
    chosen_rewards = beta * (policy_chosen - ref_chosen)
    rejected_rewards = beta * (policy_rejected - ref_rejected)
    loss = -F.logsigmoid(chosen_rewards - rejected_rewards).mean()
    return loss, chosen_rewards.detach(), rejected_rewards.detach()


def preference_loss(
    model: nn.Module, batch: Batch, beta: float, sft_coef: float
) -> tuple[Tensor, Metrics]:
    """The training loss on a batch of pairs: DPO's, and `sft_coef` x SFT's on the chosen answers.

    SFT's is a mean over each answer's own tokens, so pairs weigh the same. Metrics: `dpo_loss` (ln 2
    at the start), `margin` (chosen minus rejected reward), `accuracy` (share of margins above 0;
    chance at the first step, where all are 0), both rewards, `kl`: ½(ln π - ln π_ref)² on the
    chosen answers, a gauge of KL(π ‖ π_ref) in nats that needs no sampling and cannot explode.
    """
    logps = batch_logps(model, batch).sum(-1)  # (2B,)
    (chosen, rejected), (ref_chosen, ref_rejected) = logps.chunk(2), batch["ref_logps"].chunk(2)
    loss, good, bad = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    metrics = {
        "dpo_loss": loss.detach(),
        "margin": (good - bad).mean(),
        "accuracy": (good > bad).float().mean(),
        "chosen_reward": good.mean(),
        "rejected_reward": bad.mean(),
        "kl": ((good / beta) ** 2).mean() / 2,
    }
    if sft_coef:
        tokens = (batch["labels"][: len(chosen), 1:] != IGNORED).sum(-1)
        loss = loss - sft_coef * (chosen / tokens).mean()
    return loss + model.router_loss, metrics


def check_pair(row: dict) -> str | None:
    """Return what is wrong with a preference row of either form, or None."""
    missing = [side for side in SIDES if not row.get(side)]
    if missing:
        return f'"{missing[0]}" is missing or empty; a pair needs both. It has {sorted(row)}.'
    if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            return 'needs "prompt" with the question, since the answers are strings.'
    else:
        for side in SIDES:
            fault = check_conversation({"conversations": row[side]})
            if fault or row[side][-1]["role"] != "assistant":
                return f'"{side}": {fault or "must end with an answer of the assistant."}'
    chosen, rejected = (as_messages(row, side) for side in SIDES)
    if chosen[:-1] != rejected[:-1]:
        return "the two sides answer different prompts; only their last messages may differ."
    for side, messages in zip(SIDES, (chosen, rejected), strict=True):
        if not messages[-1]["content"].strip():
            return f'the answer of "{side}" is empty. Remove the row.'
    if chosen[-1]["content"] == rejected[-1]["content"]:
        return "chosen and rejected are equal: there is no preference to learn. Remove the row."
    return None


def as_messages(row: dict, side: str) -> list[Message]:
    """Return one side of a row as a conversation, whichever form the row has."""
    if isinstance(row[side], list):
        return row[side]
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row[side]},
    ]


def encode_pair(tokenizer: Tokenizer, row: dict, max_length: int) -> Pair:
    """Encode both conversations; the labels are the last answer and its `<|im_end|>` alone.

    Earlier answers stand on both sides and would cancel in the margin anyway.
    """
    pair: Pair = {}
    for side in SIDES:
        messages = as_messages(row, side)
        input_ids, labels = chat_labels(tokenizer, messages, max_length)
        prompt = len(tokenizer.encode_chat(messages[:-1], add_generation_prompt=True))
        labels = [IGNORED] * min(prompt, len(labels)) + labels[prompt:]
        pair[side] = {"input_ids": input_ids, "labels": labels}
    return pair


def fault_of(pair: Pair, max_length: int) -> str | None:
    """Return why an encoded pair teaches nothing, or only a part of it; None if all is well."""
    chosen, rejected = (pair[side]["labels"] for side in SIDES)
    if not all(any(label != IGNORED for label in labels) for labels in (chosen, rejected)):
        return f"pair left out: its prompt fills max_seq_len={max_length}"
    if chosen == rejected:
        return f"pair left out: its answers differ only beyond max_seq_len={max_length}"
    return None


def read_pairs(path: str, tokenizer: Tokenizer, max_length: int) -> tuple[list[Pair], Counter]:
    """Read and encode preference rows; return those that teach something, and what was wrong.

    Raises:
        UserError: a row that is no pair (see `check_pair`), or no pair is left.
    """
    pairs, faults = [], Counter()
    for row in read_jsonl(path, check_pair):
        pair = encode_pair(tokenizer, row, max_length)
        fault = fault_of(pair, max_length)
        if fault:
            faults[fault] += 1
            continue
        pairs.append(pair)
        ends = [pair[side]["labels"][-1] for side in SIDES]
        if any(end not in (IGNORED, tokenizer.eos_id) for end in ends):
            faults[f"answer cut at max_seq_len={max_length}"] += 1
    if not pairs:
        raise UserError(f"{path}: no pair is left ({dict(faults)}). Raise max_seq_len.")
    return pairs, faults


def pad_pairs(pairs: Sequence[Pair], pad_id: int) -> Batch:
    """Stack B pairs into 2B rows, first all chosen, then all rejected: one forward pass for both."""
    batch = pad_batch([pair[side] for side in SIDES for pair in pairs], pad_id)
    if "ref_logps" in pairs[0]:
        refs = [pair["ref_logps"][side] for side in range(2) for pair in pairs]
        batch["ref_logps"] = torch.tensor(refs)
    return batch


@torch.no_grad()
def pair_logps(model: nn.Module, pairs: Sequence[Pair], pad_id: int, size: int = 32) -> Tensor:
    """Return ln π(answer | prompt) of chosen and rejected, (N, 2) on the CPU, in eval mode."""
    was_training = model.training
    model.eval()
    found = []
    for start in range(0, len(pairs), size):
        batch = pad_pairs(pairs[start : start + size], pad_id)
        on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
        logps = batch_logps(model, on_device).sum(-1)
        found.append(logps.view(2, -1).T.cpu())
    model.train(was_training)
    return torch.cat(found)


def dpo_task(config: DPOConfig, model: nn.Module, tokenizer: Tokenizer) -> Task:
    """Encode the pairs of `data_path` (and `eval_data_path`) and store the reference's log-probs.

    They are computed in the number format of training: the margins of the first step are then 0
    up to rounding, and the loss is ln 2.
    """
    train, faults = read_pairs(config.data_path, tokenizer, config.max_seq_len)
    held = config.eval_data_path
    heldout = read_pairs(held, tokenizer, config.max_seq_len)[0] if held else []

    def reference(part: Sequence[Pair], first: int) -> Tensor:
        with autocast(config, model.device):
            return pair_logps(model, part, tokenizer.pad_id, config.batch_size)

    for pairs in filter(None, (train, heldout)):
        logps = torch.cat(distributed.in_parts(reference, pairs))
        for pair, refs in zip(pairs, logps.tolist(), strict=True):
            pair["ref_logps"] = refs
    return Task(
        train=train,
        heldout=heldout,
        lengths=[max(len(pair[side]["input_ids"]) for side in SIDES) for pair in train],
        collate=partial(pad_pairs, pad_id=tokenizer.pad_id),
        loss=partial(preference_loss, beta=config.beta, sft_coef=config.sft_coef),
        count=lambda batch: len(batch["input_ids"]) // 2,
        warnings=dict(faults),
    )
