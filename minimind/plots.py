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
    """Training and held-out loss, in the unit of the stage, against steps; the learning rate beside it."""
    figure, (left, right) = new_figure(2, width=9)
    steps = [row["step"] for row in history]
    left.plot(steps, [row["loss"] for row in history], color=BLUE, label="training")
    measured = [row for row in history if "heldout_loss" in row]
    if measured:
        left.plot([r["step"] for r in measured], [r["heldout_loss"] for r in measured],
                  "o-", color=ORANGE, label="held-out")  # fmt: skip
    left.set(xlabel="step", ylabel="training loss", title=title, ylim=(0, None))
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


def ladder(rows: dict[str, dict[str, tuple[float, float, bool]]]) -> Figure:
    """What each weight can do: abilities from top to bottom, the stages from left to right.

    Args:
        rows: by ability and stage, in order: a share, its baseline (nan: no tick), and whether
            this stage raised it. What was not measured is left out, and its place stays empty.
    """
    columns = list(dict.fromkeys(stage for cells in rows.values() for stage in cells))
    size, width = (10, 0.5 * len(rows) + 1.2), 0.86  # width: of a full bar; columns are 1 apart
    figure, ax = plt.subplots(figsize=size, layout="constrained", subplot_kw={"frame_on": False})
    for y, cells in enumerate(rows.values()):
        for stage, (share, baseline, raised) in cells.items():
            x, colour = columns.index(stage), BLUE if raised else SKY
            ink = "white" if raised and share > 0.5 else "black"
            ax.barh(y, [width, width * share], 0.64, left=x, color=["#EEEEEE", colour])
            ax.plot([x + width * baseline] * 2, [y - 0.42, y + 0.42], color=ORANGE, lw=2)
            ax.text(x + 0.4 * width, y, f"{share:.2f}", color=ink, ha="center", va="center")
    meaning = {"raised by this stage": BLUE, "measured, not raised": SKY, "baseline": ORANGE}
    for label, colour in meaning.items():
        ax.barh(0, 0, color=colour, label=label)
    ax.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.01))
    ax.set_xticks([x + width / 2 for x in range(len(columns))], columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.set(xlim=(-0.05, len(columns)), ylim=(len(rows) - 0.4, -0.6))
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    return figure
