"""What ends a run early: a loss that is not finite, an explosion, a signal."""

import math

import pytest
import torch
from helpers import SMALL, texts, write_lines

import minimind
from minimind import UserError
from minimind.checkpoint import read_tensors
from minimind.config import data_samples
from minimind.stages import STAGES


def settings_for(folder, **more):
    return {**SMALL, "data_path": write_lines(folder / "pretrain.jsonl", texts()), "out_dir": str(folder / "out"),
            "tokenizer_path": str(data_samples("tokenizer.json")), "device": "cpu", **more}  # fmt: skip


def spoil(monkeypatch, calls, factor=math.nan):
    """Multiply the loss (and so the gradient) of some training batches by `factor`."""
    make, count = STAGES["pretrain"], iter(range(1, 10**6))

    def spoilt(config, model, tokenizer):
        task = make(config, model, tokenizer)
        loss = task.loss

        def bad_loss(model, batch):
            value, figures = loss(model, batch)
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
