"""Where the rows of a run's log go: a JSONL file always, a live curve in notebooks, wandb if asked.

A tracker is a function that takes a row such as `{"step": 10, "loss": 5.1, "lr": 3e-3, …}`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from minimind.config import TrainConfig
from minimind.errors import UserError

Row = dict[str, float]
Tracker = Callable[[Row], None]


def in_notebook() -> bool:
    """Return whether this runs in a Jupyter kernel, where a picture can be redrawn in place."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ in ("ZMQInteractiveShell", "Shell")  # "Shell" is Colab's


def start_trackers(config: TrainConfig, name: str, history: list[Row]) -> list[Tracker]:
    """Return the trackers of a run; a resumed run's `history` is what they already know."""
    trackers: list[Tracker] = [jsonl_log(Path(config.out_dir) / f"{name}.log.jsonl", history)]
    if in_notebook():
        trackers.append(live_curve(name, history))
    if config.use_wandb:
        trackers.append(wandb_run(config, name))
    return trackers


def jsonl_log(path: Path, history: list[Row]) -> Tracker:
    """Write each row as a line of JSON; rows beyond the resume point are dropped first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in history))

    def log(row: Row) -> None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    return log


def live_curve(name: str, history: list[Row]) -> Tracker:
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


def wandb_run(config: TrainConfig, name: str) -> Tracker:
    """Log to Weights & Biases; without a key the run is kept offline, for `wandb sync` later."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("use_wandb needs wandb: pip install 'minimind-course[trackers]'") from error
    offline = not (
        os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") or wandb.api.api_key
    )
    run = wandb.init(
        project=config.wandb_project,
        name=name,
        config=asdict(config),
        mode="offline" if offline else None,
    )
    return lambda row: run.log(row, step=int(row["step"]))
