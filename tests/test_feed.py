import threading
import time

import pytest
import torch

from minimind.data import pad_batch
from minimind.feed import one_ahead, to_device
from minimind.losses import labelled_places

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def pinned(monkeypatch):
    """Page-locked memory without a GPU: remember which thread asked for it."""
    threads = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda t: threads.append(threading.get_ident()) or t
    )
    return threads


def make(number):
    return [{"input_ids": torch.tensor([number])}]


def test_on_a_cpu_batches_are_made_when_asked_for(pinned):
    made = []
    feed = one_ahead(lambda n: made.append(n) or make(n), range(5), CPU)
    assert next(feed)[0]["input_ids"] == 0 and made == [0] and not pinned


def test_for_a_gpu_the_next_is_made_while_this_one_is_used(pinned):
    made = []
    feed = one_ahead(lambda n: made.append(n) or make(n), range(3, 7), CUDA)
    assert next(feed)[0]["input_ids"] == 3
    until = time.monotonic() + 5
    while made != [3, 4] and time.monotonic() < until:
        time.sleep(0.001)
    assert made == [3, 4]  # one ahead, not more
    assert [int(group[0]["input_ids"]) for group in feed] == [4, 5, 6]
    assert len(set(pinned)) == 1 and pinned[0] != threading.get_ident()
    assert list(one_ahead(make, [], CUDA)) == []


def test_an_error_in_the_thread_reaches_the_loop(pinned):
    def fails(number):
        raise ValueError(number)

    with pytest.raises(ValueError, match="7"):
        next(one_ahead(fails, [7], CUDA))


def test_a_batch_on_the_device_knows_its_labelled_places(pinned):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
            {"input_ids": [4, 5], "labels": [4, -100]}]  # fmt: skip
    (batch,) = next(one_ahead(lambda n: [pad_batch(rows, 0)], [1], CUDA))  # found in the thread
    assert len(pinned) == 3 and batch["places"].tolist() == [0, 1]
    batch = to_device(pad_batch(rows, 0), CPU)
    assert batch["places"].tolist() == [0, 1]
    assert torch.equal(batch["places"], labelled_places(batch["labels"]))
    assert set(to_device({"row": torch.tensor([1])}, CPU)) == {"row"}
