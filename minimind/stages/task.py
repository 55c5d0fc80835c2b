"""What a stage hands to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from minimind.data import Batch, Example


@dataclass
class Task:
    """A stage, as the training loop sees it.

    Attributes:
        train, heldout: the examples; `heldout` may be empty.
        lengths: tokens in each training example, for bucketing.
        collate: examples to a batch of tensors.
        loss: (model, batch) to the mean loss of the batch.
        count: how many things the loss is a mean over. The loop weights each batch by it, so
            that accumulated batches of unequal size give the gradient of the one big batch.
    """

    train: Sequence[Example]
    heldout: Sequence[Example]
    lengths: Sequence[int]
    collate: Callable[[Sequence[Example]], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    count: Callable[[Batch], int]
