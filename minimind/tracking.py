"""Where the rows of a run's log go: a JSONL file always, a live curve, and a tracker if asked.

A tracker is a function that takes a row such as `{"step": 10, "loss": 5.1, "lr": 3e-3, …}`. In a
notebook the curve is a picture, in a terminal a line of small blocks beside the progress bar.

A resumed run goes on in the tracker's run of the same id. The rows between the resume point and
the kill come twice and are identical: wandb ignores the second, TensorBoard purges the first,
trackio draws one on the other.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from math import isfinite
from pathlib import Path

from tqdm.auto import tqdm

from minimind.checkpoint import write_atomically
from minimind.config import TrainConfig
from minimind.errors import needed

Row = dict[str, float]
Tracker = Callable[[Row], None]
WANDB_SECONDS = 20  # how long wandb may look for its server before the run is kept offline
BLOCKS = "▁▂▃▄▅▆▇█"


def in_notebook() -> bool:
    """Return whether this runs in a Jupyter kernel, where a picture can be redrawn in place."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ in ("ZMQInteractiveShell", "Shell")  # "Shell" is Colab's


def start_trackers(
    config: TrainConfig, name: str, run_id: str, history: Sequence[Row]
) -> list[Tracker]:
    """Return the trackers of a run; a resumed run's `history` is what they already know.

    Args:
        name: the weight's, for people.
        run_id: the same in every part of a resumed run.

    Raises:
        UserError: the log cannot be written or the tracker's package is not installed.
    """
    trackers: list[Tracker] = [jsonl_log(Path(config.out_dir) / f"{name}.log.jsonl", history)]
    if in_notebook():
        trackers.append(live_curve(name, history))
    if config.tracker != "none":
        start = {"wandb": wandb_run, "tensorboard": tensorboard_run, "trackio": trackio_run}
        trackers.append(start[config.tracker](config, name, run_id, history))
    return [harmless(tracker) for tracker in trackers]


def harmless(tracker: Tracker) -> Tracker:
    """Let a tracker fail (a full disk, a lost connection) without ending the run; say so once."""
    warned = False

    def log(row: Row) -> None:
        nonlocal warned
        try:
            tracker(row)
        except Exception as error:
            if not warned:
                tqdm.write(f"Warning: the log of step {row['step']} failed ({error}).")
            warned = True

    return log


def jsonl_log(path: Path, history: Sequence[Row]) -> Tracker:
    """Write each row as a line of JSON; rows beyond the resume point are dropped first.

    What a full disk did not take is written with the next row.
    """
    text = "".join(json.dumps(row) + "\n" for row in history)
    write_atomically(path, lambda file: file.write(text.encode()))
    size, waiting = path.stat().st_size, b""

    def log(row: Row) -> None:
        nonlocal size, waiting
        waiting += json.dumps(row).encode() + b"\n"
        os.truncate(path, size)  # half a line of the last try
        with path.open("ab") as file:
            file.write(waiting)
        size, waiting = size + len(waiting), b""

    return log


def postfix(history: Sequence[Row]) -> dict[str, str]:
    """Return what stands beside the progress bar; in a terminal with the curve so far."""
    row = history[-1]
    shown = {"loss": f"{row['loss']:.3f}", "lr": f"{row['lr']:.1e}"}
    if sys.stderr.isatty() and "utf" in (sys.stderr.encoding or "").lower():
        name = "reward" if "reward" in row else "loss"
        shown[f"{name} curve"] = sparkline([row[name] for row in history if name in row])
    return shown


def sparkline(values: Sequence[float], width: int = 20) -> str:
    """Draw numbers as a line of at most `width` blocks, each the mean of its share of them.

    >>> sparkline([8, 6, 5, 4, 3, 2, 2, 1])
    '█▆▅▄▃▂▂▁'
    """
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    finite = [mean for mean in means if isfinite(mean)] or [0.0]
    low, high = min(finite), max(finite)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0
    return "".join(BLOCKS[round((m - low) * scale)] if isfinite(m) else " " for m in means)


def live_curve(name: str, history: Sequence[Row]) -> Tracker:
    """Draw the loss (in RL the reward) as it comes, in one picture that is redrawn about twice a second at most."""
    import time

    import matplotlib.pyplot as plt
    from IPython.display import display

    from minimind.plots import loss_curve, reward_curve

    rows, handle, drawn = list(history), display(display_id=True), 0.0

    def log(row: Row) -> None:
        nonlocal drawn
        rows.append(row)
        last = row["step"] == row["total_steps"]
        if len(rows) > 1 and (last or time.monotonic() - drawn > 2):
            draw = reward_curve if "reward" in row else loss_curve
            figure = draw(rows, title=name)
            handle.update(figure)
            plt.close(figure)
            drawn = time.monotonic()

    return log


def wandb_run(config: TrainConfig, name: str, run_id: str, history: Sequence[Row]) -> Tracker:
    """Log to Weights & Biases. Without a key or a network the run is kept offline.

    The parts of a resumed run have one id; `wandb sync` joins them, if it gets them all in one call.
    """
    wandb = needed("wandb", "trackers")
    start = dict(project=config.wandb_project, name=name, id=run_id, resume="allow", config=asdict(config),
                 reinit="finish_previous")  # fmt: skip
    settings = wandb.Settings(init_timeout=WANDB_SECONDS)
    keys = (os.environ.get("WANDB_API_KEY"), os.environ.get("WANDB_MODE"), wandb.api.api_key)
    why = "" if any(keys) else "there is no key"
    if not why:
        try:
            run = wandb.init(**start, settings=settings)
        except wandb.Error as error:
            why = str(error).splitlines()[0]
            wandb.teardown()  # it still holds the id
    if why:
        run = wandb.init(**start, mode="offline")
    if run.offline:
        print(f"wandb keeps this run offline ({why or 'WANDB_MODE'}). Send all parts of it later with: "
              f"wandb sync wandb/offline-run-*-{run_id}")  # fmt: skip

    def log(row: Row) -> None:
        run.log(row, step=int(row["step"]))
        if row["step"] == row["total_steps"]:
            run.finish()

    return log


def tensorboard_run(config: TrainConfig, name: str, run_id: str, history: Sequence[Row]) -> Tracker:
    """Write `<out_dir>/tensorboard/<name>-<id>`; look at it with `tensorboard --logdir <out_dir>`."""
    needed("tensorboard", "trackers")
    from torch.utils.tensorboard import SummaryWriter

    done = int(history[-1]["step"]) if history else 0
    folder = Path(config.out_dir) / "tensorboard" / f"{name}-{run_id}"
    writer = SummaryWriter(str(folder), purge_step=done + 1)

    def log(row: Row) -> None:
        for figure in row.keys() - {"step", "total_steps"}:
            writer.add_scalar(figure, row[figure], int(row["step"]))
        writer.flush()  # a killed process has written what it has logged

    return log


def trackio_run(config: TrainConfig, name: str, run_id: str, history: Sequence[Row]) -> Tracker:
    """Log to trackio's local database; look at it with `trackio show`."""
    trackio = needed("trackio", "trackers")
    run = trackio.init(project=config.wandb_project, name=f"{name}-{run_id}", resume="allow",
                       config=asdict(config), embed=False)  # fmt: skip

    def log(row: Row) -> None:
        run.log({figure: row[figure] for figure in row if figure != "step"}, step=int(row["step"]))
        if row["step"] == row["total_steps"]:
            run.finish()

    return log
