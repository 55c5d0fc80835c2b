"""What several stages share: log-probabilities of given tokens, means over sequences, a frozen copy."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

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


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over sequences of each sequence's mean over its own tokens, a scalar.

    Every sequence weighs the same, however long. One without a token counts as 0.

    Args:
        values, mask: (N, T); what stands where the mask is 0 does not matter, not even NaN.
    """
    mask = mask.bool()
    per_sequence = values.masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp(min=1)
    return per_sequence.mean()


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return e^(ref - π) - (ref - π) - 1 per token: never negative, 0 where the two agree.

    With tokens sampled from π its mean is KL(π ‖ ref), and it varies less than π - ref, whose mean
    is the same (Schulman, "Approximating KL divergence", 2020; DeepSeekMath, arXiv 2402.03300,
    eq. 4).
    """
    difference = ref_logps - logps
    return difference.exp() - difference - 1


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model that stays as it is: no dropout, no gradients."""
    return copy.deepcopy(model).eval().requires_grad_(False)
