"""What ends a run early: a loss that is not finite, an explosion, a signal."""

import copy
import json
import math
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import SMALL, texts, write_lines
from torch.utils._python_dispatch import TorchDispatchMode

import minimind
from minimind import UserError
from minimind.checkpoint import read_tensors
from minimind.config import data_samples, stage_config
from minimind.guard import IN_A_ROW, Interrupted, Watch
from minimind.stages import STAGES
from minimind.trainer import Run, check_finite, make_optimizers, make_scaler, step_unless


def settings_for(folder, **more):
    return {**SMALL, "data_path": write_lines(folder / "pretrain.jsonl", texts()), "out_dir": str(folder / "out"),
            "tokenizer_path": str(data_samples("tokenizer.json")), "device": "cpu", **more}  # fmt: skip


def spoil(monkeypatch, calls, factor=math.nan):
    """Multiply the loss (and so the gradient) of some training batches by `factor`; log a figure."""
    make, count = STAGES["pretrain"], iter(range(1, 10**6))

    def spoilt(config, model, tokenizer):
        task = make(config, model, tokenizer)
        loss = task.loss

        def bad_loss(model, batch):
            value, figures = loss(model, batch)
            figures = {**figures, "figure": value.detach()}
            return value * (factor if model.training and next(count) in calls else 1), figures

        task.loss = bad_loss
        return task

    monkeypatch.setitem(STAGES, "pretrain", spoilt)


def finite(state):
    return all(bool(tensor.isfinite().all()) for tensor in state.values())


def test_a_loss_that_is_not_finite_never_reaches_a_resume_point(tmp_path, monkeypatch):
    spoil(monkeypatch, calls={7})  # the first batch of step 4: no row of the log, but a save
    with pytest.raises(UserError, match="loss"):
        minimind.train(
            "pretrain", **settings_for(tmp_path, epochs=3, log_interval=100, save_interval=1)
        )
    point = read_tensors(tmp_path / "out/checkpoints/pretrain_32_resume.pth")
    assert point["step"] == 3 and finite(point["model"])


def test_the_diagnosis_says_what_was_seen_and_what_to_try(tmp_path, monkeypatch):
    spoil(monkeypatch, calls={8})
    with pytest.raises(UserError) as stopped:
        minimind.train("pretrain", **settings_for(tmp_path, grad_clip=0.0, dtype="bfloat16"))
    for part in (
        "Step 4: the loss is nan", r"before: 7.", "norm of the gradient nan", "learning rate 0.0009",
        "training examples ", "All weights are still finite", "the resume point is of step 3",
        "a learning_rate below 0.001", "grad_clip=1 (it was 0)", "dtype=float32 (it was bfloat16)",
        "skip_bad_steps=1",
    ):  # fmt: skip
        assert part in str(stopped.value)


def test_the_examples_that_the_diagnosis_names_hold_the_bad_one(tmp_path, monkeypatch):
    """The loss is spoilt wherever one certain block is in the batch."""
    make, chosen = STAGES["pretrain"], {}

    def spoilt(config, model, tokenizer):
        task = make(config, model, tokenizer)
        loss, block = task.loss, torch.tensor(task.train[17]["input_ids"])

        def bad_loss(model, batch):
            value, figures = loss(model, batch)
            there = bool((batch["input_ids"] == block).all(dim=1).any())
            return value * (math.inf if there and model.training else 1), figures

        task.loss = bad_loss
        chosen["blocks"] = len(task.train)
        return task

    monkeypatch.setitem(STAGES, "pretrain", spoilt)
    with pytest.raises(UserError) as stopped:
        minimind.train("pretrain", **settings_for(tmp_path))
    named = str(stopped.value).split("training examples ")[1].split(" (counted")[0].split(", ")
    assert "17" in named and len(named) == 8 < chosen["blocks"]  # two batches of four


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("factor", [math.nan, 1e4])
def test_a_bad_step_is_skipped_when_asked_and_changes_nothing(
    optimizer, factor, tmp_path, monkeypatch, capsys
):
    spoil(monkeypatch, calls={7}, factor=factor)
    weights = {}

    def keep(step, model):
        weights[step] = {n: t.clone() for n, t in model.state_dict().items()}

    settings = settings_for(tmp_path, optimizer=optimizer, skip_bad_steps=1, log_interval=2)
    result = minimind.train("pretrain", callback=keep, **settings)
    assert all(torch.equal(weights[3][n], weights[4][n]) for n in weights[3])
    assert not all(torch.equal(weights[4][n], weights[5][n]) for n in weights[3])
    assert result.metrics["skipped_steps"] == 1 and finite(weights[5])
    rows = {row["step"]: row for row in result.history}
    assert "skipped_steps" not in rows[2] and rows[4]["skipped_steps"] == 1
    assert all(row["loss"] < 10 for row in result.history)  # row 4 shows step 3's
    assert capsys.readouterr().out.count("Step 4 skipped: loss ") == 1


def test_skipping_ends_when_no_step_is_good(tmp_path, monkeypatch):
    spoil(monkeypatch, calls=range(1, 1000))
    with pytest.raises(UserError, match=f"{IN_A_ROW} steps in a row"):
        minimind.train("pretrain", **settings_for(tmp_path, epochs=5, skip_bad_steps=1))


def test_a_finite_explosion_stops_and_a_spike_is_logged(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with monkeypatch.context() as patch:
        spoil(patch, calls={7, 8}, factor=1e4)
        with pytest.raises(UserError, match=r"Step 4: the loss has exploded to 7"):
            minimind.train("pretrain", **settings_for(tmp_path / "a"))
    spoil(monkeypatch, calls={27, 28}, factor=3)
    result = minimind.train("pretrain", **settings_for(tmp_path / "b", epochs=3, log_interval=10))
    (row,) = [row for row in result.history if "loss_spike" in row]
    assert row["step"] == 20 and row["loss_spike_step"] == 14
    assert row["loss_spike"] > 2 * row["loss"] and row["loss_spike_grad_norm"] > 0
    assert "Step 14: a loss spike" in capsys.readouterr().out


def make_run(model, **settings):
    config = stage_config("pretrain", **{"device": "cpu", "dtype": "float32", **settings})
    return Run(model, make_optimizers(model, config), make_scaler(config, model.device)), config


def test_figures_wait_on_the_device_and_the_first_bad_step_is_named():
    """On a GPU nobody looks before a row of the log or a save."""
    watch, config = Watch(), stage_config("pretrain", device="cpu")
    for step, loss in enumerate([5.0, 4.0, math.nan, math.nan, 3.0], start=1):
        figures = {"step": step, "lr": 1e-3, "loss": torch.tensor(loss), "limit": 1e3}
        watch.pending.append({**figures, "grad_norm": torch.tensor(1.0)})
    why, figures = watch.look(config)
    assert why == "the loss is nan" and figures["step"] == 3 and watch.recent == [5.0, 4.0]


def test_all_figures_come_to_the_host_in_one_copy():
    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket is not torch.ops.aten._local_scalar_dense  # float(tensor)
            return func(*args, **(kwargs or {}))

    watch = Watch()
    for step in range(1, 4):
        named = {name: torch.tensor(step + 0.5) for name in ("loss", "grad_norm", "kl")}
        watch.pending.append({"step": step, "lr": 1e-3, "limit": 100.0, **named})
    with Copies():
        assert watch.look(stage_config("pretrain", device="cpu")) is None
    assert watch.row() == {"loss": 3.5, "lr": 1e-3, "grad_norm": 3.5, "kl": 2.5}


def test_weights_that_have_overflowed_are_not_saved(small_model):
    run, config = make_run(small_model())
    figures = {"step": 1, "lr": 1e-3, "loss": 2.0, "grad_norm": 1.0, "limit": math.inf}
    run.watch.pending.append(figures)
    check_finite(run, config, lambda step: [], with_weights=True)
    run.model.model.norm.weight.data[3] = math.inf
    with pytest.raises(UserError, match=r"1 weights are not finite.*model.norm.weight"):
        check_finite(run, config, lambda step: [], with_weights=True)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_taken_or_left_as_a_whole(fused, small_model):
    """The way of the fused kernels, which is a GPU's, and the one that asks the host."""
    start, states = small_model(), []
    for flags in ([False, True], [False], [False, False]):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        for bad in flags:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, math.nan if bad else 0.1)
            step_unless(torch.tensor(bad), [optimizer])
        states.append((model.state_dict(), optimizer.state_dict()["state"][0]))
    (skipped, memory), (once, memory_once), (twice, _) = states
    assert all(torch.equal(skipped[n], once[n]) for n in once)
    assert all(torch.equal(memory[n], memory_once[n]) for n in memory_once)
    assert not all(torch.equal(once[n], twice[n]) for n in once)


def interrupt_at(step, number=signal.SIGINT):
    def callback(now, model):
        if now == step:
            signal.raise_signal(number)

    return callback


def same(one, other, but=("tokens_per_second",)):
    return [{**row, **dict.fromkeys(but, 0)} for row in one] == [
        {**row, **dict.fromkeys(but, 0)} for row in other
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_a_resume_point_that_goes_on_bit_for_bit(number, tmp_path, monkeypatch):
    spoil(monkeypatch, calls=())
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    (tmp_path / "whole").mkdir()
    more = {"log_interval": 4, "save_interval": 100}
    whole = minimind.train("pretrain", **settings_for(tmp_path / "whole", **more))
    settings = settings_for(tmp_path, **more)
    with pytest.raises(Interrupted) as stopped:
        minimind.train("pretrain", callback=interrupt_at(5, number), **settings)
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert "after step 6 of 14" in str(stopped.value)  # the callback comes after step 5's look
    assert not (tmp_path / "out/pretrain_32.pth").exists()
    call = str(stopped.value).split("Go on with: ")[1]
    assert "\n" not in str(stopped.value) and call.startswith("train('pretrain', preset='full'")
    result = eval(call, {"train": minimind.train})
    assert (
        same(result.history, whole.history) and "figure" in whole.history[2]
    )  # row 8's mean spans the stop
    weights = [read_tensors(r.weight_path) for r in (result, whole)]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(minimind.train("pretrain", **settings_for(tmp_path)))
    )
    thread.start()
    thread.join()
    assert results[0].metrics["steps"] == 14


def start_command(folder, *more):
    settings = {**settings_for(folder, epochs=200, save_interval=10**6), "out_dir": "out"}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "minimind", "pretrain", *flags, *more]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    log = folder / "out/pretrain_32.log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert process.poll() is None
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_how_to_go_on(number, code, tmp_path):
    process = start_command(tmp_path, "--from_resume", "0")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    command = shlex.split(last.split("Go on with: ")[1])
    assert command[:2] == ["minimind", "pretrain"] and command[-2:] == ["--from_resume", "1"]
    assert command.count("--from_resume") == 1
    point = read_tensors(tmp_path / "checkpoints/pretrain_32_resume.pth")
    assert f"after step {point['step']} of" in last


# Short sleeps: a signal that comes between the end of a handler and the rest of a sleep waits for its end.
STUCK = """
import signal, sys, time, minimind, json

def hang(step, model):
    if step == 2:
        print("stuck", flush=True)
        for _ in range(1200):
            time.sleep(0.05)

minimind.train("pretrain", callback=hang, **json.loads(sys.argv[1]))
"""


def test_the_second_ctrl_c_stops_at_once(tmp_path):
    command = [sys.executable, "-c", STUCK, json.dumps(settings_for(tmp_path))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "stuck\n"
    process.send_signal(signal.SIGINT)
    assert any("Stopping after this step" in process.stderr.readline() for _ in range(4))
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode != 0 and time.monotonic() - began < 10


TOLD_AGAIN = """
import signal, sys, minimind, json
minimind.train("pretrain", callback=lambda step, model: step == 2 and [signal.raise_signal(15) for _ in range(3)],
               **json.loads(sys.argv[1]))
"""


def test_more_sigterms_lose_nothing(tmp_path):
    command = [sys.executable, "-c", TOLD_AGAIN, json.dumps(settings_for(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "Stopped by SIGTERM after step 3 of 14" in done.stderr
    assert done.stderr.count("Stopping after this step") == 1
    assert read_tensors(tmp_path / "out/checkpoints/pretrain_32_resume.pth")["step"] == 3


def test_an_interrupted_notebook_shows_one_line(tmp_path):
    client = pytest.importorskip("jupyter_client")
    settings = settings_for(tmp_path, epochs=1000, save_interval=10**6)
    manager, kernel = client.manager.start_new_kernel()
    try:
        asked = kernel.execute(f"import minimind; minimind.train('pretrain', **{settings!r})")
        log = tmp_path / "out/pretrain_32.log.jsonl"
        while not (log.exists() and log.read_text().count("\n") > 2):
            assert manager.is_alive()
            time.sleep(0.05)
        manager.interrupt_kernel()
        reply = kernel.get_shell_msg(timeout=60)
        while reply["parent_header"]["msg_id"] != asked:
            reply = kernel.get_shell_msg(timeout=60)
    finally:
        kernel.stop_channels()
        manager.shutdown_kernel(now=True)
    reply = reply["content"]
    assert reply["status"] == "error" and reply["ename"] == "Interrupted"
    assert len(reply["traceback"]) == 1 and "from_resume=1" in reply["traceback"][0]
    assert read_tensors(tmp_path / "out/checkpoints/pretrain_32_resume.pth")["step"] > 2
