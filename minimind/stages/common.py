"""What several stages share: log-probabilities of a batch's labels, means over sequences, a frozen copy."""

from __future__ import annotations

import copy
from functools import partial

from torch import Tensor, nn

from minimind.data import Batch
from minimind.losses import label_logps


def batch_logps(model: nn.Module, batch: Batch) -> Tensor:
    """Return ln p of every label of a batch under the model, (B, T-1), as `token_logps` does."""
    read = partial(label_logps, labels=batch["labels"], places=batch.get("places"))
    return model(batch["input_ids"], read=read)


def centred(values: Tensor) -> Tensor:
    """Return values (…, n) minus their mean over n; exactly 0 where all n are equal.

    Their mean may be off by a rounding error, and an optimizer such as AdamW, which divides a
    gradient by its own size, would make a step of it.
    """
    equal = values.amax(-1, keepdim=True) == values.amin(-1, keepdim=True)
    return (values - values.mean(-1, keepdim=True)).masked_fill(equal, 0)


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
    return (difference.expm1() - difference).clamp(min=0)  # as exp - 1 it would be rounding noise


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model that stays as it is: no dropout, no gradients."""
    return copy.deepcopy(model).eval().requires_grad_(False)
