"""What a stage hands to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from minimind.data import Batch, Example

Metrics = dict[str, Tensor]


class Stateful(Protocol):
    """Something that belongs in the resume point."""

    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> object: ...


@dataclass
class Task:
    """A stage, as the training loop sees it.

    Attributes:
        train, heldout: the examples; `heldout` may be empty.
        lengths: tokens in each training example, for bucketing.
        collate: examples to a batch of tensors.
        loss: (model, batch) to the mean loss of the batch and figures to log (detached means).
        count: how many things these are means over. The loop weights each batch by it, so that
            accumulated batches of unequal size give the gradient of the one big batch.
        rollout: reinforcement learning only. (model, batches of prompts, step) to groups of
            batches to train on, one optimizer step each, and figures to log.
        memory: what the stage itself must remember in a resume point.
        saved: model to the state dict that is saved, if not all weights are.
        sidecar: more entries for the json beside the weight.
        warnings: what was wrong with the data but could be left out, with its count.
    """

    train: Sequence[Example]
    heldout: Sequence[Example]
    lengths: Sequence[int]
    collate: Callable[[Sequence[Example]], Batch]
    loss: Callable[[nn.Module, Batch], tuple[Tensor, Metrics]]
    count: Callable[[Batch], float]
    rollout: (
        Callable[[nn.Module, Sequence[Batch], int], tuple[list[list[Batch]], dict[str, float]]]
        | None
    ) = None
    memory: Stateful | None = None
    saved: Callable[[nn.Module], dict[str, Tensor]] | None = None
    sidecar: dict = field(default_factory=dict)
    warnings: dict[str, int] = field(default_factory=dict)
