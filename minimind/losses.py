"""Log-probabilities of labels: what every loss of the course is made of.

Left out: the losses themselves; each stands with its stage.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minimind.data import IGNORED

ONE_CHUNK = 2**23  # logits that are held at once in float32: 32 MiB
SMALL = 6 * 2**20  # a batch with so few, such as the course's, is computed as a whole


def next_labels(labels: Tensor) -> Tensor:
    """Return for every position of (B, T) the label it is to predict: the next one; -100 at the end.

    So the logits need not be cut to T-1, which would copy them all, and their gradient.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ln p(label[t+1] | tokens up to t) in float32, (B, T-1); 0 where the label is -100.

    Args:
        logits: (B, T, V).
        labels: (B, T), aligned with the input ids; the shift by one happens here.
    """
    nll = F.cross_entropy(
        logits.flatten(0, 1).float(), next_labels(labels).flatten(), ignore_index=IGNORED, reduction="none"
    )  # fmt: skip
    return -nll.view(labels.shape)[:, :-1]


def labelled_places(labels: Tensor) -> Tensor:
    """Return which predictions, counted over all rows of (B, T-1), have a label: (N,) numbers.

    How many there are depends on the data, so on a GPU this waits for it: call it on the CPU.
    """
    return (labels[:, 1:] != IGNORED).flatten().nonzero()[:, 0]


def is_small(labels: Tensor, vocab_size: int) -> bool:
    """Whether all logits of a batch are so few that chunks are not worth their while."""
    return labels.numel() * vocab_size <= SMALL


def label_logps(
    hidden: Tensor, head: nn.Linear, labels: Tensor, places: Tensor | None = None
) -> Tensor:
    """Return `token_logps(head(hidden), labels)`, with at most ONE_CHUNK logits in float32 at any time.

    A larger batch has logits for its labelled positions alone, chunk by chunk.

    Args:
        hidden: (B, T, C), what the output projection `head` reads.
        labels: (B, T).
        places: `labelled_places(labels)`, if it is known.
    """
    if is_small(labels, head.out_features):
        return token_logps(head(hidden), labels)
    if places is None:
        places = labelled_places(labels)
    targets = labels[:, 1:]
    wanted = targets.flatten()[places]  # (N,)
    states = hidden[:, :-1].flatten(0, 1)[places]  # (N, C)
    parts = in_chunks(partial(_logps, head), ONE_CHUNK // head.out_features, states, wanted)
    return hidden.new_zeros(targets.numel(), dtype=torch.float32).index_copy(
        0, places, torch.cat(parts)
    ).view(targets.shape)  # fmt: skip


def in_chunks(work: Callable[..., Tensor], rows: int, *inputs: Tensor) -> list[Tensor]:
    """Return `work` of the first `rows` rows of all inputs, of the next, and so on.

    What it computes on the way is forgotten for all but the last, and made again in the backward
    pass, as in gradient checkpointing (arXiv 1604.06174).
    """
    *early, last = zip(*(each.split(max(1, rows)) for each in inputs), strict=True)
    parts = [checkpoint(work, *chunk, use_reentrant=False) for chunk in early]
    return [*parts, work(*last)]  # its backward comes first, so what it computed may as well stay


def _logps(head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(head(states).float(), targets, reduction="none")
