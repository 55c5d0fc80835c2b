"""Figures as plain functions, in one style: each takes data and returns a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe & Ito's colours, which people with any kind of colour vision can tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#777777",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)


def new_figure(
    columns: int = 1, width: float = 6.4, height: float = 3.6
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes side by side, without frames at the top and right."""
    figure, axes = plt.subplots(
        1, columns, figsize=(width, height), squeeze=False, layout="constrained"
    )
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25)
    return figure, list(axes[0])


def loss_curve(history: Sequence[dict], title: str = "") -> Figure:
    """Loss per token against steps, held-out loss where it was measured; learning rate beside it."""
    figure, (left, right) = new_figure(2, width=9)
    steps = [row["step"] for row in history]
    left.plot(steps, [row["loss"] for row in history], color=BLUE, label="training")
    measured = [row for row in history if "heldout_loss" in row]
    if measured:
        left.plot([r["step"] for r in measured], [r["heldout_loss"] for r in measured],
                  "o-", color=ORANGE, label="held-out")  # fmt: skip
    left.set(xlabel="step", ylabel="loss (nats per token)", title=title, ylim=(0, None))
    left.legend(frameon=False)
    right.plot(steps, [row["lr"] for row in history], color=GREEN)
    right.set(xlabel="step", ylabel="learning rate", title="schedule", ylim=(0, None))
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return figure


def reward_curve(history: Sequence[dict], title: str = "") -> Figure:
    """Mean reward and accuracy against steps, distance to the reference beside them.

    What reinforcement learning should show instead of its loss, which is about 0 by design.
    """
    figure, (left, right) = new_figure(2, width=9)
    for name, colour in (("reward", BLUE), ("accuracy", ORANGE)):
        rows = [row for row in history if name in row]
        left.plot([r["step"] for r in rows], [r[name] for r in rows], color=colour, label=name)
    left.set(xlabel="step", ylabel="mean over the sampled answers", title=title)
    left.legend(frameon=False)
    rows = [row for row in history if "kl" in row]
    right.plot([r["step"] for r in rows], [r["kl"] for r in rows], color=GREEN)
    right.set(xlabel="step", ylabel="KL to the reference (nats per token)", ylim=(0, None))
    return figure


def lines(
    x: Sequence[float], ys: dict[str, Sequence[float]], xlabel: str, ylabel: str, title: str = ""
) -> Figure:
    """Several named curves over one x."""
    figure, (ax,) = new_figure()
    for (name, y), colour in zip(ys.items(), COLOURS * 2, strict=False):
        ax.plot(x, y, color=colour, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    ax.legend(frameon=False)
    return figure


def bars(
    values: dict[str, float], ylabel: str, title: str = "", highlight: Sequence[str] = ()
) -> Figure:
    """One bar for each named value, its number on top; `highlight` names stand out."""
    figure, (ax,) = new_figure()
    colours = [ORANGE if name in highlight else BLUE for name in values]
    container = ax.bar(list(values), list(values.values()), color=colours)
    ax.bar_label(container, fmt="%.2f", fontsize=9)
    ax.set(ylabel=ylabel, title=title)
    ax.tick_params(axis="x", labelrotation=30 if len(values) > 5 else 0)
    return figure


def heatmap(
    matrix: np.ndarray, labels: Sequence[str], xlabel: str, ylabel: str, title: str = ""
) -> Figure:
    """A (T, T) matrix as colours, tokens along both sides: attention, for one."""
    figure, (ax,) = new_figure(width=5.2, height=4.6)
    ax.grid(False)
    image = ax.imshow(matrix, cmap="Blues", vmin=0)
    ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    figure.colorbar(image, ax=ax, shrink=0.8)
    return figure


def before_after(report: dict) -> Figure:
    """The report card as a picture: every share that should be high, before and after its stage."""
    rows = [
        (f"{stage['stage']}: {name}", m["before"], m["after"])
        for stage in report["stages"]
        for name, m in stage["measures"].items()
        if m["better"] == "higher"
    ]
    figure, (ax,) = new_figure(width=7, height=0.4 * len(rows) + 1.2)
    y = np.arange(len(rows))[::-1]
    ax.barh(y + 0.2, [row[1] for row in rows], 0.36, color=GREY, label="before")
    after = ax.barh(y - 0.2, [row[2] for row in rows], 0.36, color=BLUE, label="after")
    ax.bar_label(after, fmt="%.2f", fontsize=8, padding=2)
    ax.set_yticks(y, [row[0] for row in rows])
    ax.set(xlim=(0, 1.1), ylim=(-1, len(rows)), xlabel="share right on held-out examples")
    ax.legend(frameon=False, loc="lower right")
    return figure
