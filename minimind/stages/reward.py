"""A reward model: learn from pairs how good an answer is, as one number.

Rows are the pairs of DPO. The language model's last hidden state at the end of the answer, times
one vector, is the score; that the chosen answer is better has the probability σ(difference)
(Bradley & Terry 1952; for language models arXiv 2009.01325, eq. 1, after arXiv 1706.03741).

Left out: dropping the language model's head (it stays in the file, so that any loader reads it)
and several judges per pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.config import RewardConfig
from minimind.data import IGNORED, Batch
from minimind.errors import UserError
from minimind.model import MiniMind
from minimind.stages.dpo import Pair, pad_pairs, read_pairs
from minimind.stages.task import Metrics, Task
from minimind.tokenizer import Message, Tokenizer

ROWS = 64  # conversations in one forward pass when scoring


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, centre: float = 0.0) -> Tensor:
    """-ln σ(chosen - rejected), mean over pairs (arXiv 2009.01325, eq. 1).

    The pairs fix only differences. `centre` x (chosen + rejected)² keeps the scores around 0, where
    clipping them does no harm (arXiv 2312.09244, section 3).

    Args:
        chosen, rejected: (B,) scores.
    """
    return (-F.logsigmoid(chosen - rejected) + centre * (chosen + rejected) ** 2).mean()


def add_score(model: MiniMind) -> MiniMind:
    """Give the model the vector `score` (1, C), if it has none: zeros, so all answers are equal."""
    if not hasattr(model, "score"):
        model.score = nn.Linear(model.config.hidden_size, 1, bias=False, device=model.device)
        nn.init.zeros_(model.score.weight)
    return model


def scores_of(model: MiniMind, input_ids: Tensor, ends: Tensor) -> Tensor:
    """Return the score of every row of input_ids (B, T), read at position `ends` (B,): (B,) float32."""
    hidden = model.model(input_ids)  # (B, T, C); causal, so what follows the end does not matter
    rows = torch.arange(len(ends), device=ends.device)
    return model.score(hidden[rows, ends]).float()[:, 0]


def pair_scores(model: MiniMind, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the scores of chosen and rejected answers of `pad_pairs`, each (B,)."""
    labelled = batch["labels"] != IGNORED
    places = torch.arange(labelled.shape[1], device=labelled.device)
    return scores_of(model, batch["input_ids"], (labelled * places).argmax(1)).chunk(2)


def reward_loss(model: MiniMind, batch: Batch, centre: float) -> tuple[Tensor, Metrics]:
    """The training loss of a batch of pairs. Metrics: `accuracy` and the mean difference, `margin`."""
    chosen, rejected = pair_scores(model, batch)
    metrics = {"accuracy": pair_accuracy(chosen, rejected), "margin": (chosen - rejected).mean()}
    loss = bradley_terry_loss(chosen, rejected, centre) + model.router_loss
    return loss, {name: value.detach() for name, value in metrics.items()}


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the share of pairs whose chosen answer has the higher score; a tie is half right."""
    return ((chosen > rejected).float() + (chosen == rejected).float() / 2).mean()


@torch.no_grad()
def heldout_scores(model: MiniMind, pairs: Sequence[Pair], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return the scores of the chosen and the rejected answers of all pairs, each (N,) on the CPU."""
    found = []
    for start in range(0, len(pairs), ROWS):
        batch = pad_pairs(pairs[start : start + ROWS], pad_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        found.append(torch.stack(pair_scores(model, batch)).cpu())
    return tuple(torch.cat(found, dim=1))


@torch.no_grad()
def score_conversations(
    model: MiniMind, tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]]
) -> Tensor:
    """Return the score of the last answer of every conversation, (N,) float32 on the CPU.

    Raises:
        UserError: the model is no reward model, or a conversation does not fit its positions.
    """
    if not hasattr(model, "score"):
        raise UserError("The weight is no reward model. Train one with: minimind reward")
    room, found = model.config.max_position_embeddings, []
    for start in range(0, len(conversations), ROWS):
        some = conversations[start : start + ROWS]
        rows = [tokenizer.encode_chat(messages)[:-1] for messages in some]  # up to <|im_end|>
        longest = max(map(len, rows))
        if longest > room:
            raise UserError(f"A conversation of {longest} tokens exceeds {room} positions.")
        ids = [row + [tokenizer.pad_id] * (longest - len(row)) for row in rows]
        ends = torch.tensor([len(row) - 1 for row in rows], device=model.device)
        found.append(scores_of(model, torch.tensor(ids, device=model.device), ends).cpu())
    return torch.cat(found)


def reward_task(config: RewardConfig, model: MiniMind, tokenizer: Tokenizer) -> Task:
    """Encode the pairs of `data_path` (and `eval_data_path`) and add the score to the model."""
    length, held, skip = config.max_seq_len, config.eval_data_path, config.skip_bad_rows
    train, faults = read_pairs(config.data_path, tokenizer, length, skip)
    add_score(model)
    return Task(
        train=train,
        heldout=read_pairs(held, tokenizer, length, skip)[0] if held else [],
        lengths=train.lengths,
        collate=partial(pad_pairs, pad_id=tokenizer.pad_id),
        loss=partial(reward_loss, centre=config.centre),
        count=lambda batch: len(batch["input_ids"]) // 2,
        warnings=dict(faults),
    )
