"""Kill -9 at random moments, over all stages: every run finishes bit-identical to an unbroken one.

`python tests/kill_test.py --times 20` prints a log; under pytest it kills four times, or
`MINIMIND_KILLS` times. Every second kill waits until a resume point or weight is being written.
Fewer kills than stages take four stages that need no other one to come before them.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from minimind.checkpoint import read_tensors
from minimind.config import CONFIGS, stage_config

RAM = "/dev/shm" if os.path.isdir("/dev/shm") else None  # waiting for a disk is most of the time
TIMES_DIFFER = ("tokens_per_second", "rollout_share", "seconds")


def train_quietly(stage, settings):
    """One run in a process of its own, which a kill really ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    import torch

    from minimind import train

    torch.set_num_threads(1)  # tiny models gain nothing from more
    train(stage, preset="tiny", **settings)


class Runs:
    """All runs of the test, in one folder; processes are forked from one that has imported PyTorch."""

    def __init__(self, folder, alone):
        self.folder, self.alone = Path(folder), alone
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["minimind"])

    def start(self, stage, out_dir, **more):
        settings = {"out_dir": str(out_dir), "save_interval": 1, "log_interval": 1, **more}
        if self.alone:
            settings["from_weight"] = "none"
        process = self.context.Process(target=train_quietly, args=(stage, settings))
        process.start()
        return process

    def unbroken(self, stage):
        """Train a stage (and before it what it starts from) once; how many steps it has."""
        config = stage_config(stage, "tiny")
        for other in () if self.alone else CONFIGS:
            needed = stage_config(other, "tiny").save_weight == config.from_weight
            if needed and not weight_of(other, self.folder / "whole").exists():
                self.unbroken(other)
        if not weight_of(stage, self.folder / "whole").exists():
            process = self.start(stage, self.folder / "whole", save_interval=1000)
            process.join()
            assert process.exitcode == 0, f"{stage} failed without any kill"
        return steps_logged(stage, self.folder / "whole")

    def copy_of_the_start(self, stage, number):
        """A folder with the finished weights that the stage may start from."""
        folder = self.folder / f"killed_{number}"
        folder.mkdir()
        own = weight_of(stage, folder).stem
        for file in (self.folder / "whole").glob("*.*"):
            if file.is_file() and not file.name.startswith(own):
                os.link(file, folder / file.name)
        return folder


def weight_of(stage, folder):
    config = stage_config(stage, "tiny")
    return Path(folder) / f"{config.save_weight}_{config.hidden_size}.pth"


def kill(process, stage, folder, step, seconds, in_a_write):
    """Kill -9 so many seconds after a step was logged, or in the write after that.

    Returns whether a write was going on; None if the run had ended before.
    """
    while process.is_alive() and steps_logged(stage, folder) < step:
        time.sleep(0.005)
    process.join(seconds)
    while in_a_write and process.is_alive() and not list(folder.rglob("*.pth.partial")):
        time.sleep(0.0005)
    if not process.is_alive():
        return None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return bool(list(folder.rglob("*.pth.partial")))


def differences(stage, whole, killed):
    """What differs between two finished runs: weights, the log, the metrics."""
    found = []
    one, other = (read_tensors(weight_of(stage, folder)) for folder in (whole, killed))
    found += [n for n in one if one[n].numpy().tobytes() != other[n].numpy().tobytes()]
    paths = [weight_of(stage, folder).with_suffix("") for folder in (whole, killed)]
    logs = [Path(f"{path}.log.jsonl").read_text().splitlines() for path in paths]
    rows = [[timeless(json.loads(line)) for line in log] for log in logs]
    found += [] if rows[0] == rows[1] else ["the log"]
    metrics = [timeless(json.loads(Path(f"{p}.json").read_text())["metrics"]) for p in paths]
    return found + ([] if metrics[0] == metrics[1] else ["the metrics"])


def timeless(figures):
    return {name: str(value) for name, value in figures.items() if name not in TIMES_DIFFER}


def steps_logged(stage, folder):
    log = Path(f"{weight_of(stage, folder).with_suffix('')}.log.jsonl")
    return len(log.read_text().splitlines()) if log.exists() else 0


def kill_once(runs, stage, steps, number, rng):
    """Kill one run of a stage once, resume it until it is through, compare."""
    folder = runs.copy_of_the_start(stage, number)
    step, in_a_write = rng.randrange(steps), bool(number % 2)
    seconds = rng.uniform(0, 0.3 if step else 3)  # the first 3 seconds are those of the data
    process = runs.start(stage, folder, from_resume=1)
    writing = kill(process, stage, folder, step, seconds, in_a_write)
    killed_at = steps_logged(stage, folder)
    process = runs.start(stage, folder, from_resume=1)
    process.join()
    assert process.exitcode == 0, f"{stage} could not go on after a kill at step {killed_at}"
    wrong = differences(stage, runs.folder / "whole", folder)
    what = {None: "had ended", True: "in a write", False: "between writes"}[writing]
    print(
        f"{number:3}  {stage:9} {killed_at:3} of {steps:3} steps logged + {seconds:4.2f} s, {what:15} "
        f"{'DIFFERS: ' + ', '.join(wrong) if wrong else 'bit-identical'}",
        flush=True,
    )
    return writing is not None, not wrong


def kill_many(folder, times, seed):
    """Kill `times` runs, the stages in turn; how many were really killed, and how many came out equal."""
    alone = times < len(CONFIGS)
    runs, rng = Runs(folder, alone), random.Random(seed)
    stages = ["pretrain", "sft", "grpo", "spo"] if alone else list(CONFIGS)
    kills = same = number = 0
    while kills < times:
        stage = stages[kills % len(stages)]
        killed, equal = kill_once(runs, stage, runs.unbroken(stage), number, rng)
        number, kills, same = number + 1, kills + killed, same + (killed and equal)
        assert equal, f"{stage} differs from the unbroken run"
    return kills, same


@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9")
def test_kill_9_at_random_moments_changes_nothing():
    times = int(os.environ.get("MINIMIND_KILLS", "4"))
    with tempfile.TemporaryDirectory(dir=RAM) as place:
        assert kill_many(place, times, seed=times) == (times, times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    print(f"seed {given.seed}")
    with tempfile.TemporaryDirectory(dir=RAM) as place:
        print("{1} of {0} kills: bit-identical".format(*kill_many(place, given.times, given.seed)))
