"""The patients of exercises 13: small runs with one thing wrong in each, and a few more to watch.

Run a patient, probe what it returns, and read its code last. Each takes, as an argument, what mends
it. Models and data are toys, so that a run takes a fraction of a second; the faults are real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.trainer import learning_rate

Row = dict[str, float]

# The first patient: a language model whose loss is too good.

FIRST_SUSPECTS = (
    "the held-out rows are in the training data",
    "the labels are not shifted",
    "the model has learnt the rule",
    "the model sees the future",
)
IDS, LENGTH = 11, 8
# Three tokens of four follow a rule, the fourth may be anything. No model can do better than this.
RULE = 0.75 + 0.25 / IDS
FLOOR = -RULE * math.log(RULE) - (IDS - 1) * (0.25 / IDS) * math.log(0.25 / IDS)  # 1.06 nats


def sentences(rows: int, seed: int) -> Tensor:
    """Return (rows, LENGTH + 1) ids. The next id is 3·id + 1, or in one case of four any id."""
    draw = torch.Generator().manual_seed(seed)
    anything = torch.randint(IDS, (rows, LENGTH + 1), generator=draw)
    free = torch.rand(rows, LENGTH + 1, generator=draw) < 0.25
    ids = anything.clone()
    for t in range(LENGTH):
        ids[:, t + 1] = torch.where(free[:, t + 1], anything[:, t + 1], (3 * ids[:, t] + 1) % IDS)
    return ids


class Reader(nn.Module):
    """Embedding, positions, one layer of attention: `reader(ids (B, T)) -> logits (B, T, IDS)`."""

    def __init__(self, allowed: Tensor, width: int = 24) -> None:
        super().__init__()
        self.allowed = allowed  # (T, T) bool: may position t (row) look at position s (column)?
        self.token, self.place = nn.Embedding(IDS, width), nn.Embedding(LENGTH, width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, IDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.place.weight[: ids.shape[1]]
        scores = self.q(x) @ self.k(x).transpose(1, 2) / x.shape[-1] ** 0.5  # (B, T, T)
        look = scores.masked_fill(~self.allowed, -torch.inf).softmax(-1)
        return self.head(x + look @ self.v(x))


def first_patient(allowed: Tensor | None = None, steps: int = 100) -> tuple[Reader, list[Row]]:
    """Train a Reader; return it, and a row for every tenth step with training and held-out loss."""
    torch.manual_seed(0)
    allowed = torch.ones(LENGTH, LENGTH).triu().bool() if allowed is None else allowed
    reader, rows = Reader(allowed), []
    optimizer = torch.optim.Adam(reader.parameters(), lr=2e-2)
    heldout = sentences(128, seed=-1)

    def loss_of(ids: Tensor) -> Tensor:
        return F.cross_entropy(reader(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    for step in range(1, steps + 1):
        loss = loss_of(sentences(32, seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            with torch.no_grad():
                held = loss_of(heldout).item()
            rows.append({"step": step, "loss": loss.item(), "heldout": held})
    return reader, rows


# The second patient: a run that stops learning after a quarter.

SECOND_SUSPECTS = (
    "the gradient is not cleared",
    "the learning rate is too small from the start",
    "the data are used up",
    "the schedule counts batches",
)
BATCHES, ACCUMULATION, PEAK = 102, 4, 0.5


def second_patient(rates: list[float] | None = None) -> list[Row]:
    """Fit a linear map on BATCHES batches, ACCUMULATION of them for each step; one row per step.

    Args:
        rates: the learning rate of every step, in place of the run's own.
    """
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(6, generator=draw)
    width = torch.tensor([1.0, 0.8, 0.6, 0.5, 0.4, 0.3])  # some directions are learnt slowly
    weight, rows = torch.zeros(6, requires_grad=True), []
    steps, gathered = math.ceil(BATCHES / ACCUMULATION), 0.0
    for batch in range(BATCHES):
        x = width * torch.randn(32, 6, generator=draw)
        loss = ((x @ weight - x @ truth) ** 2).mean()
        (loss / ACCUMULATION).backward()
        gathered += loss.item() / ACCUMULATION
        rate = learning_rate(min(batch, steps), steps, PEAK)
        if (batch + 1) % ACCUMULATION == 0 or batch + 1 == BATCHES:
            with torch.no_grad():
                weight -= (rates[len(rows)] if rates else rate) * weight.grad
            rows.append(
                {"step": len(rows) + 1, "loss": gathered, "grad_norm": weight.grad.norm().item()}
            )
            weight.grad, gathered = None, 0.0
    return rows


# The third patient: calm for a while, and then not a number.

THIRD_SUSPECTS = (
    "the learning rate is too high",
    "a batch has no labels",
    "the data hold a NaN",
    "the logarithm of a probability of 0",
)


def batch_of_points(step: int) -> tuple[Tensor, Tensor]:
    """Return points (16, 4) and their classes (16,): the largest of the first three coordinates."""
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(16, 4, generator=draw)
    labels = x[:, :3].argmax(-1)
    if step == 30:  # a device that was set to another scale
        x[5] *= 1000
        labels[5] = x[5, :3].argmin()
    return x, labels


def minus_log_p(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of -ln p over the classes that are right."""
    p = logits.softmax(-1)
    return -p.gather(-1, labels[:, None]).log().mean()


def third_patient(loss_of: Callable[[Tensor, Tensor], Tensor] = minus_log_p) -> list[Row]:
    """Learn to sort the points; one row per step, up to the first that is not finite."""
    torch.manual_seed(0)
    model, rows = nn.Linear(4, 3), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(60):
        x, labels = batch_of_points(step)
        logits = model(x)
        loss = loss_of(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        right = (logits.argmax(-1) == labels).float().mean().item()
        rows.append({"step": step + 1, "loss": loss.item(), "grad_norm": norm, "right": right})
        if not math.isfinite(loss.item() + norm):
            break
    return rows


# Runs for the alarm: small networks that learn a curve, well or badly.

KINDS = ("healthy", "flat", "diverges", "not finite", "overfits")


def watched_run(kind: str, seed: int) -> list[Row]:
    """Train one small network; return rows with step, loss and heldout."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    truth = F.normalize(torch.randn(4), dim=0) * 1.5

    def points(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 4)
        return x, (x @ truth).sin()[:, None] + 0.4 * torch.randn(n, 1)

    few, heldout, rows = points(16), points(256), []
    rate = {"flat": 1e-7, "overfits": 3e-2}.get(kind, 1e-2)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    for step in range(80):
        x, y = few if kind == "overfits" else points(24)
        if kind == "not finite" and step == 50 + seed % 10:
            y = y / 0 * 0
        for group in optimizer.param_groups:
            group["lr"] = rate * 1.12 ** max(0, step - 20) if kind == "diverges" else rate
        loss = F.mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            held = F.mse_loss(net(heldout[0]), heldout[1]).item()
        rows.append({"step": step + 1, "loss": loss.item(), "heldout": held})
    return rows
