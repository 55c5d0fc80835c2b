import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import SMALL, chats, texts, write_lines
from torch.utils._python_dispatch import TorchDispatchMode

import minimind
from minimind import UserError
from minimind.checkpoint import read_tensors
from minimind.config import data_samples, stage_config
from minimind.data import pad_batch
from minimind.losses import labelled_places
from minimind.stages.pretrain import count_labels, language_model_loss, pretrain_task
from minimind.stages.task import Task
from minimind.trainer import Run, learning_rate, make_optimizers, make_scaler, optimizer_step

TASK = Task([], [], [], list, language_model_loss, count_labels)


def gradient(model, batches, config):
    """The gradient that a step sees: what is left in .grad when the optimizer is called."""
    seen = {}
    run = Run(model, make_optimizers(model, config), make_scaler(config, model.device))
    run.optimizers[0].step = lambda: seen.update(
        {n: p.grad.clone() for n, p in model.named_parameters()}
    )
    loss, _, _ = optimizer_step(run, batches, TASK, 1e-3, config)
    return float(loss), seen


def test_accumulated_batches_of_unequal_length_give_the_gradient_of_the_big_batch(small_model):
    config = stage_config("sft", dtype="float32", grad_clip=0.0, device="cpu")
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length, answer in [(5, 2), (40, 30), (9, 1), (17, 9), (33, 3), (8, 8)]:
        ids = torch.randint(3, 120, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length - answer) + ids[-answer:]})
    model = small_model()
    big_loss, big = gradient(model, [pad_batch(rows, 0)], config)
    for cuts in ([2, 4], [1, 2, 3], [1, 1, 1, 1, 1, 1], [5, 1]):
        parts, start = [], 0
        for size in cuts:
            parts.append(pad_batch(rows[start : start + size], 0))
            start += size
        loss, accumulated = gradient(model, parts, config)
        assert loss == pytest.approx(big_loss, abs=1e-6)
        for name, expected in big.items():
            torch.testing.assert_close(accumulated[name], expected, atol=1e-6, rtol=0)
    mean_of_means = sum(gradient(model, [pad_batch([r], 0)], config)[0] for r in rows) / len(rows)
    assert abs(mean_of_means - big_loss) > 1e-3  # the wrong way would be seen


class Waiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device: reading a value, counting, copying back."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
            torch.ops.aten.is_nonzero, torch.ops.aten.equal,
        ), func  # fmt: skip
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("large", [False, True])
def test_a_step_never_waits_for_the_device(dtype, large, small_model, monkeypatch):
    if large:
        monkeypatch.setattr("minimind.losses.SMALL", 0)
        monkeypatch.setattr("minimind.losses.ONE_CHUNK", 5 * 120)
    config = stage_config("sft", dtype=dtype, device="cpu")
    ids = torch.randint(3, 120, (3, 9))
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids > 80, -100)}
    places = labelled_places(batch["labels"])
    monkeypatch.setattr("minimind.feed.labelled_places", lambda labels: places)  # known on the host
    model = small_model().train()
    run = Run(model, make_optimizers(model, config), make_scaler(config, model.device))
    task = Task([], [], [], list, language_model_loss, lambda batch: 7)  # counted on the host
    with Waiting():
        for _ in range(2):
            optimizer_step(run, [batch, batch], task, 1e-3, config)
        with pytest.raises(AssertionError):  # what is refused would be seen
            float(ids[0, 0])


def test_the_schedule():
    assert learning_rate(0, 100, 1.0) == 1.0
    assert learning_rate(50, 100, 1.0) == pytest.approx(0.55)
    assert learning_rate(100, 100, 1.0) == pytest.approx(0.1)
    assert learning_rate(25, 100, 2.0) == pytest.approx(
        2 * (0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    )
    assert [learning_rate(s, 10**9, 1.0, 4) for s in range(5)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1]
    )


def settings_for(folder, stage="pretrain", **more):
    data = texts() if stage == "pretrain" else chats()
    return {**SMALL, "data_path": write_lines(folder / f"{stage}.jsonl", data), "out_dir": str(folder / "out"),
            "tokenizer_path": str(data_samples("tokenizer.json")), **more}  # fmt: skip


def test_the_tail_of_an_epoch_is_trained_and_saved(tmp_path):
    settings = settings_for(tmp_path, epochs=1, batch_size=4, accumulation_steps=4)
    result = minimind.train("pretrain", **settings)
    config = stage_config("pretrain", **settings)
    blocks = len(pretrain_task(config, result.model, result.tokenizer).train)
    assert blocks % 16  # there is a tail, and it does not fill its group
    assert result.metrics["steps"] == math.ceil(math.ceil(blocks / 4) / 4)
    point = read_tensors(tmp_path / "out/checkpoints/pretrain_32_resume.pth")
    weight = read_tensors(result.weight_path)
    assert point["step"] == result.metrics["steps"]
    assert all(torch.equal(weight[n], point["model"][n]) for n in weight)


SCRIPT = """
import json, sys, minimind
settings = json.loads(sys.argv[1])
minimind.train(settings.pop("stage"), **settings)
"""


def start(settings):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(settings)], stderr=subprocess.DEVNULL
    )


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_resume_after_kill_9_is_bit_identical(stage, tmp_path):
    """Kill the process at random moments until it gets through; compare with an unbroken run."""
    more = {"pretrain": {"epochs": 6}, "sft": {"epochs": 12, "from_weight": "none"}}[stage]
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = {"stage": stage, **settings_for(tmp_path / "whole", stage, **more)}
    killed = {**whole, "out_dir": str(tmp_path / "killed/out"), "from_resume": 1}
    assert start(whole).wait() == 0
    rng, kills = random.Random(stage), 0
    name = "pretrain" if stage == "pretrain" else "full_sft"
    log = tmp_path / f"killed/out/{name}_32.log.jsonl"
    for _ in range(3):
        process = start(killed)
        before = len(log.read_text().splitlines()) if log.exists() else 0
        while process.poll() is None and (
            not log.exists() or len(log.read_text().splitlines()) < before + 2
        ):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.15)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert start(killed).wait() == 0
    assert kills >= 1
    runs = [
        [json.loads(line) for line in (tmp_path / f"{n}/out/{name}_32.log.jsonl").open()]
        for n in ("whole", "killed")
    ]
    for one, other in zip(*runs, strict=True):
        assert {**one, "tokens_per_second": 0} == {**other, "tokens_per_second": 0}
    weights = [read_tensors(tmp_path / f"{n}/out/{name}_32.pth") for n in ("whole", "killed")]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_a_resume_point_of_other_settings_is_refused(tmp_path):
    settings = settings_for(tmp_path, epochs=1)
    minimind.train("pretrain", **settings)
    with pytest.raises(UserError, match=r"learning_rate was 0.001 and is 0.002"):
        minimind.train("pretrain", **{**settings, "learning_rate": 2e-3, "from_resume": 1})


def test_training_lowers_the_loss_and_logs_it(tmp_path):
    rows = []
    result = minimind.train("pretrain", callback=lambda step, model: rows.append(step),
                            **settings_for(tmp_path, epochs=8, learning_rate=3e-3))  # fmt: skip
    assert result.history[0]["loss"] == pytest.approx(
        math.log(result.tokenizer.vocab_size), abs=0.2
    )
    assert result.history[-1]["loss"] < 0.6 * result.history[0]["loss"]
    assert rows == list(range(result.metrics["steps"] + 1))
    logged = [json.loads(line) for line in (tmp_path / "out/pretrain_32.log.jsonl").open()]
    assert logged == result.history


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_every_dtype_trains_and_saves_float32(dtype, tmp_path):
    result = minimind.train("pretrain", **settings_for(tmp_path, epochs=1, dtype=dtype))
    assert {t.dtype for t in read_tensors(result.weight_path).values()} == {torch.float32}
    assert math.isfinite(result.metrics["loss"])


def test_a_stage_starts_from_the_weight_before_it(tmp_path):
    settings = settings_for(tmp_path, epochs=1)
    with pytest.raises(UserError, match="Make it with: minimind pretrain"):
        minimind.train("sft", **settings_for(tmp_path, "sft"))
    minimind.train("pretrain", **settings)
    result = minimind.train("sft", **settings_for(tmp_path, "sft", epochs=1))
    sidecar = json.loads(result.weight_path.with_suffix(".json").read_text())
    assert [s["stage"] for s in sidecar["stages"]] == ["pretrain", "sft"]
    with pytest.raises(UserError, match=r"num_hidden_layers=3 \(the weight has 2\)"):
        minimind.train("sft", **settings_for(tmp_path, "sft", num_hidden_layers=3))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(UserError, match="Lower learning_rate"):
        minimind.train(
            "pretrain", **settings_for(tmp_path, learning_rate=1e12, grad_clip=0.0, epochs=9)
        )


def test_mixture_of_experts_trains(tmp_path):
    result = minimind.train(
        "pretrain", **settings_for(tmp_path, use_moe=1, epochs=4, learning_rate=3e-3)
    )
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.model.config.use_moe
