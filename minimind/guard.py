"""What ends a run before its last step: a signal, or figures that are not worth going on with.

`Signals` turns Ctrl-C and SIGTERM into a wish that the loop grants after the step at hand. `Watch`
looks at the loss and the gradient's norm of every step; a step that is not finite or has exploded is
never taken, and the run stops with a diagnosis or, if asked, goes on without it.

Left out: going back to an older resume point and past the batch by itself. A loss that explodes has
a cause, and a run that hides it ends with a worse weight.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from minimind import distributed
from minimind.config import TrainConfig
from minimind.errors import UserError

WINDOW = 50  # losses that a new one is compared with
SPIKE = 2.0  # beyond so many times their median, and 1 above it, a loss is logged as a spike
EXPLODED = 100.0  # beyond so many times their median (or 1, if that is more), a step is not taken
IN_A_ROW = 25  # bad steps after which skipping is no cure; float16's scale has shrunk by 2^25

Figures = dict[str, Tensor | float]


class Interrupted(KeyboardInterrupt):
    """A run that was stopped by a signal, and can go on. `str(error)` says how.

    Attributes:
        signal: the signal's number.
        go_on: the call or the command that goes on.
    """

    def __init__(self, number: int, step: int, total_steps: int, resume_path: Path) -> None:
        self.signal, self.go_on = number, "the same settings and from_resume=1"
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self.done = f"Stopped by {name} after step {step} of {total_steps}, saved in {resume_path}."

    def __str__(self) -> str:
        return f"{self.done} Go on with: {self.go_on}"

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows instead of the traceback."""
        return [str(self)]


class Signals:
    """While it is open, Ctrl-C (SIGINT) and SIGTERM only leave their number in `received`.

    A second Ctrl-C acts as it would without this, so that a step that hangs can be stopped. More
    SIGTERMs change nothing: systemd, Slurm and torchrun send several. Only the main thread can
    catch signals; elsewhere nothing changes.
    """

    def __init__(self) -> None:
        self.received, self._before = 0, {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, _: object) -> None:
        if number == signal.SIGINT:
            signal.signal(number, self._before.pop(number))
        text = "\nStopping after this step, with a resume point. A second Ctrl-C stops at once.\n"
        if not self.received and distributed.is_first():
            os.write(2, text.encode())  # not print, which may be what was interrupted
        self.received = self.received or number


@dataclass
class Watch:
    """The figures of the steps since the last row of the log, and the losses before them.

    Figures stay on the device until somebody looks, so that a GPU need not wait for the host at
    every step.

    Attributes:
        pending: of every step (in RL: update) since the last row its step, lr, loss, grad_norm, the
            `limit` that its loss had, and what the stage logs.
        recent: the last losses of steps that were taken.
        skipped: steps that were not taken in all; `in_a_row`: up to now.
        spike: the worst loss spike since the last row, as it is logged; empty if there was none.
    """

    pending: list[Figures] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    skipped: int = 0
    in_a_row: int = 0
    spike: dict[str, float] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        """The loss beyond which a step has exploded, by the losses looked at so far."""
        return EXPLODED * max(1, median(self.recent or [inf]))

    def look(self, config: TrainConfig) -> tuple[str, Figures] | None:
        """Bring new figures to the host. Return why the run must end, and the step's; or None."""
        new = [figures for figures in self.pending if isinstance(figures["loss"], Tensor)]
        to_host(new)
        for figures in new:
            if why := self._judge(figures, config):
                return why, figures
        return None

    def _judge(self, figures: Figures, config: TrainConfig) -> str:
        loss, norm = figures["loss"], figures["grad_norm"]
        if is_good(figures):
            self.in_a_row = 0
            self._compare(figures)
            return ""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row == IN_A_ROW:
            return f"{IN_A_ROW} steps in a row were bad: not finite, or with a loss that exploded"
        if config.dtype == "float16" and isfinite(loss) and not isfinite(norm):
            return ""  # too large for float16: the scaler will try a smaller scale
        if config.skip_bad_steps:
            distributed.say(
                f"Step {figures['step']:.0f} skipped: loss {loss}, norm of the gradient {norm}."
            )
            return ""
        if isfinite(loss) and isfinite(norm):
            return f"the loss has exploded to {loss:.4g}"
        return f"the loss is {loss}" if not isfinite(loss) else f"the gradient's norm is {norm}"

    def _compare(self, figures: Figures) -> None:
        """Compare the loss of a good step with those before it."""
        step, loss, norm = (figures[name] for name in ("step", "loss", "grad_norm"))
        usual = median(self.recent) if self.recent else loss
        if len(self.recent) >= WINDOW // 5 and loss > max(SPIKE * usual, usual + 1):
            distributed.say(
                f"Step {step:.0f}: a loss spike, {loss:.3f}; the median before is {usual:.3f}. "
                f"Norm of the gradient: {norm:.2f}."
            )
            found = {"loss_spike": loss, "loss_spike_step": step, "loss_spike_grad_norm": norm}
            self.spike = max(self.spike or found, found, key=lambda spike: spike["loss_spike"])
        self.recent = [*self.recent, loss][-WINDOW:]

    def row(self) -> dict[str, float]:
        """Return what is logged of the steps since the last row, and forget them.

        Loss and gradient are the last step's, the stage's figures the mean over all; steps that
        were not taken count only if there are no others.
        """
        good = [figures for figures in self.pending if is_good(figures)] or self.pending
        row = {"loss": good[-1]["loss"], "lr": self.pending[-1]["lr"], "grad_norm": good[-1]["grad_norm"],
               **mean_figures(good), **self.spike}  # fmt: skip
        if self.skipped:
            row["skipped_steps"] = self.skipped
        self.pending, self.spike = [], {}
        return row


def to_host(steps: list[Figures]) -> None:
    """Replace the tensors among figures by their numbers, with one copy from the device for all."""
    found = [(step, n) for step in steps for n, value in step.items() if isinstance(value, Tensor)]
    values = torch.stack([step[n].float() for step, n in found]).tolist() if found else []
    for (step, n), value in zip(found, values, strict=True):
        step[n] = value


def is_good(figures: Figures) -> bool:
    """Return whether loss and gradient of a step are finite, and the loss within its limit."""
    finite = isfinite(figures["loss"]) and isfinite(figures["grad_norm"])
    return finite and figures["loss"] <= figures["limit"]


def mean_figures(figures: list[Figures]) -> dict[str, float]:
    """Return the mean of every figure of the stage over the steps that have it."""
    names = set().union(*figures) - {"step", "lr", "loss", "grad_norm", "limit"}
    values = {name: [step[name] for step in figures if name in step] for name in names}
    return {name: sum(found) / len(found) for name, found in sorted(values.items())}


@torch.no_grad()
def not_finite(model: nn.Module) -> list[str]:
    """Return the names of the weights that hold a NaN or an infinity."""
    names, tensors = zip(*model.named_parameters(), strict=True)
    flags = distributed.whole(torch.stack([tensor.isfinite().all() for tensor in tensors]))
    return [name for name, finite in zip(names, flags.tolist(), strict=True) if not finite]


def diagnosis(
    why: str, figures: Figures, examples: Sequence[int], model: nn.Module, config: TrainConfig,
    watch: Watch, saved_step: int,
) -> UserError:  # fmt: skip
    """Return the error that ends a run: what was seen, what is unharmed, and what to try."""
    broken = not_finite(model)
    shown = ", ".join(map(str, examples[:12])) + (", …" if len(examples) > 12 else "")
    before = ", ".join(f"{loss:.3g}" for loss in watch.recent[-3:]) or "none"
    state = (
        f"{len(broken)} weights are not finite any more (such as {broken[0]})"
        if broken
        else "All weights are still finite"
    )
    point = f"is of step {saved_step}" if saved_step else "has not been written yet"
    tries = [
        f"a learning_rate below {config.learning_rate:g} or more than {config.warmup_steps} warmup_steps",
        "" if 0 < config.grad_clip <= 1 else f"grad_clip=1 (it was {config.grad_clip:g})",
        "" if config.dtype == "float32" else f"dtype=float32 (it was {config.dtype})",
        "a look at these rows" if examples else "",
        "" if config.skip_bad_steps or not saved_step else "from_resume=1 and skip_bad_steps=1, to leave such steps out",
    ]  # fmt: skip
    return UserError(
        f"Step {figures['step']:.0f}: {why}. Loss {figures['loss']:.4g} (before: {before}), norm of "
        f"the gradient {figures['grad_norm']:.4g}, learning rate {figures['lr']:.3g}"
        + (f", training examples {shown} (counted from 0)" if examples else "")
        + f". {state}; the resume point {point}. Try {'; '.join(filter(None, tries))}."
    )
