"""Where rows go: the JSONL file, the terminal, and three trackers, real ones where they are installed."""

import importlib.util
import json
import signal
import subprocess
import sys
import types

import pytest
from helpers import SMALL, texts, write_lines

import minimind
from minimind import UserError
from minimind.config import data_samples, stage_config
from minimind.guard import Interrupted
from minimind.tracking import jsonl_log, postfix, sparkline, wandb_run


def settings_for(folder, **more):
    return {**SMALL, "data_path": write_lines(folder / "pretrain.jsonl", texts()), "out_dir": str(folder / "out"),
            "tokenizer_path": str(data_samples("tokenizer.json")), "wandb_project": "ours", **more}  # fmt: skip


def train_in_two_parts(folder, **more):
    """Stop after step 6 of 14, go on; the log of the whole run."""
    settings = settings_for(folder, **more)
    with pytest.raises(Interrupted):
        minimind.train(
            "pretrain", **settings, callback=lambda step, _: step == 5 and signal.raise_signal(2)
        )
    return minimind.train("pretrain", **settings, from_resume=1).history  # fmt: skip


class FakeRun:
    """Notes what it is told."""

    def __init__(self, **given):
        self.given, self.rows, self.finished = given, [], False
        self.offline = given.get("mode") == "offline"

    def log(self, row, step):
        self.rows.append((step, row["loss"]))

    def finish(self):
        self.finished = True


def fake_package(monkeypatch, name, init, **more):
    module = types.ModuleType(name)
    module.init, module.__dict__["api"] = init, types.SimpleNamespace(api_key=None)
    module.__dict__.update(more)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture(params=["wandb", "trackio"])
def fake(request, monkeypatch):
    runs = []

    def init(**given):
        runs.append(FakeRun(**given))
        return runs[-1]

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake_package(monkeypatch, request.param, init, Settings=dict, Error=RuntimeError)
    return request.param, runs


def test_a_resumed_run_continues_the_trackers_run(fake, tmp_path):
    tracker, runs = fake
    history = train_in_two_parts(tmp_path, tracker=tracker)
    first, second = runs
    identity = {"wandb": "id", "trackio": "name"}[tracker]
    assert first.given[identity] == second.given[identity] != "pretrain_32"
    assert second.given["resume"] == "allow" and second.given["project"] == "ours"
    assert second.given["config"]["batch_size"] == 4
    assert first.rows + second.rows == [(row["step"], row["loss"]) for row in history]
    assert (first.finished, second.finished) == (False, True)
    minimind.train("pretrain", **settings_for(tmp_path, tracker=tracker))
    assert runs[2].given[identity] != first.given[identity]  # a new run is another one


def test_use_wandb_is_the_guides_word_for_the_tracker(monkeypatch):
    assert stage_config("pretrain", use_wandb=1).tracker == "wandb"
    with pytest.raises(UserError, match="two trackers"):
        stage_config("pretrain", use_wandb=1, tracker="trackio")
    with pytest.raises(UserError, match="Did you mean 'tensorboard'"):
        stage_config("pretrain", tracker="tensorbord")


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "trackio"])
def test_a_missing_package_is_named(tracker, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(UserError, match=rf"package {tracker}: pip install -e .*trackers"):
        minimind.train("pretrain", **settings_for(tmp_path, tracker=tracker))


class NoNetwork(Exception):
    pass


@pytest.mark.parametrize("key, why", [("", "there is no key"), ("0" * 40, "no such host")])
def test_wandb_stays_offline_without_a_key_or_a_network(key, why, monkeypatch, capsys):
    calls = []

    def init(mode=None, settings=None, **given):
        calls.append((mode, settings, given))
        if mode != "offline":
            raise NoNetwork("lookup api.wandb.ai: no such host\nand more lines")
        return FakeRun(mode=mode, **given)

    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake_package(
        monkeypatch,
        "wandb",
        init,
        Settings=dict,
        Error=NoNetwork,
        teardown=lambda: calls.append(("teardown", {}, {})),
    )
    wandb_run(stage_config("pretrain"), "pretrain_32", "abc", [])
    assert calls[-1][0] == "offline" and calls[-1][2]["id"] == "abc"
    assert [mode for mode, _, _ in calls] == ([None, "teardown"] if key else []) + ["offline"]
    assert all(settings["init_timeout"] <= 30 for mode, settings, _ in calls if mode is None)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and why in printed
    assert printed.endswith("wandb sync wandb/offline-run-*-abc\n")


def installed(name):
    found = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(found, reason=f"{name} is not installed")


@installed("wandb")
def test_real_wandb_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train_in_two_parts(tmp_path, use_wandb=1, wandb_project="ours")
    commands = {
        line.split("later with: ")[1]
        for line in capsys.readouterr().out.splitlines()
        if "later with" in line
    }
    (command,) = commands  # of both parts the same
    assert command.startswith("wandb sync wandb/offline-run-*-")
    dry = subprocess.run(
        f"{sys.executable} -m {command} --dry-run", shell=True, capture_output=True, text=True
    )
    assert "Would sync 2 run(s)" in dry.stdout + dry.stderr


@installed("tensorboard")
def test_real_tensorboard_has_every_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = settings_for(tmp_path, tracker="tensorboard", save_interval=3)
    with pytest.raises(ZeroDivisionError):  # dies at step 5; the resume point is of step 3
        minimind.train("pretrain", **settings, callback=lambda step, _: 1 / (5 - step))
    history = minimind.train("pretrain", **settings, from_resume=1).history
    (folder,) = (tmp_path / "out/tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [row["step"] for row in history]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in history])


@installed("trackio")
def test_real_trackio_keeps_one_run(tmp_path, monkeypatch):
    import trackio
    from trackio import sqlite_storage, utils

    for module in (utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    history = train_in_two_parts(tmp_path, tracker="trackio")
    (run,) = trackio.Api().runs("ours")
    logged = sqlite_storage.SQLiteStorage.get_logs("ours", run.name)
    assert [entry["step"] for entry in logged] == [row["step"] for row in history]


def test_a_log_that_cannot_be_written_ends_nothing_and_is_made_up(tmp_path):
    path = tmp_path / "out/x.log.jsonl"
    log = jsonl_log(path, [{"step": 1}])
    log({"step": 2})
    path.rename(path.with_suffix(".away"))
    with pytest.raises(OSError):
        log({"step": 3})
    path.with_suffix(".away").rename(path)
    with path.open("ab") as file:
        file.write(b'{"st')  # half a line
    log({"step": 4})
    assert [json.loads(line)["step"] for line in path.open()] == [1, 2, 3, 4]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    class Broken(FakeRun):
        def log(self, row, step):
            raise ConnectionError("the server is gone")

    fake_package(monkeypatch, "trackio", Broken)
    result = minimind.train("pretrain", **settings_for(tmp_path, tracker="trackio"))
    assert result.metrics["steps"] == 14
    assert capsys.readouterr().out.count("the server is gone") == 1


def test_the_curve_in_the_terminal(monkeypatch):
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0]) == "▁" and len(sparkline(list(range(1000)))) == 20
    assert sparkline([3, 1, float("nan"), 2]) == "█▁ ▅"
    rows = [{"step": s, "loss": 9 - s, "lr": 1e-3} for s in range(1, 9)]
    assert "loss curve" not in postfix(rows)  # not a terminal
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: True, encoding="utf-8"))
    assert postfix(rows) == {"loss": "1.000", "lr": "1.0e-03", "loss curve": "█▇▆▅▄▃▂▁"}
    assert "reward curve" in postfix([{**row, "reward": 0.5} for row in rows])
    sys.stderr.encoding = "cp1252"
    assert "loss curve" not in postfix(rows)
