"""How batches reach the device without making it wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from minimind.data import Batch
from minimind.losses import labelled_places


def one_ahead(
    make: Callable[[int], list[Batch]], numbers: Iterable[int], device: torch.device
) -> Iterator[list[Batch]]:
    """Yield `make(n)` for every number; for a GPU the next is made in a thread while it computes.

    That thread also finds the places of the labels, and puts all into page-locked memory, from which
    the GPU can fetch it by itself. A CPU has nothing to gain: there each is made when it is asked for.
    """
    if device.type != "cuda":
        yield from map(make, numbers)
        return

    def pinned(number: int) -> list[Batch]:
        return [
            {n: tensor.pin_memory() for n, tensor in with_places(b).items()} for b in make(number)
        ]

    with ThreadPoolExecutor(1) as thread:
        coming = None
        for number in numbers:
            ready, coming = coming, thread.submit(pinned, number)
            if ready:
                yield ready.result()
        if coming:
            yield coming.result()


def with_places(batch: Batch) -> Batch:
    """Add the `places` of a batch's labels while it is on the host, where they are known at once.

    On the device they would have to be counted first, and the host would wait for the count.
    """
    if "labels" not in batch or "places" in batch or batch["labels"].device.type != "cpu":
        return batch
    return {**batch, "places": labelled_places(batch["labels"])}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch on the device, with the places of its labels."""
    return {n: tensor.to(device, non_blocking=True) for n, tensor in with_places(batch).items()}
