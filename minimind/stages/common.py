"""What several stages share: log-probabilities of given tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from minimind.data import IGNORED


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ln p(label[t+1] | tokens up to t) in float32, (B, T-1); 0 where the label is -100.

    Args:
        logits: (B, T, V).
        labels: (B, T), aligned with the input ids; the shift by one happens here.
    """
    predictions = logits[:, :-1].flatten(0, 1).float()  # (B·(T-1), V)
    targets = labels[:, 1:]
    nll = F.cross_entropy(predictions, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return -nll.view(targets.shape)
