import json
import shutil

import pytest
import torch
from helpers import SMALL, texts, write_lines

import minimind
from minimind import UserError
from minimind.checkpoint import read_tensors
from minimind.compiling import compile_blocks
from minimind.config import data_samples, stage_config
from minimind.losses import token_logps

CONFIG = stage_config("pretrain", "tiny", dtype="float32", device="cpu")
SHAPES = [(2, 12), (3, 7), (4, 31), (2, 64)]


def run_backward(model, shape, seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(120, shape)
    model.zero_grad()
    loss = -token_logps(model(ids), ids).mean() + model.router_loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.3}, {"use_moe": True, "qk_norm": True}])
def test_checkpointed_gradients_are_bit_identical(settings, small_model):
    model = small_model(**settings).train()
    loss, wanted = run_backward(model, (3, 17))
    model.model.gradient_checkpointing = True
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    again, found = run_backward(model, (3, 17))
    assert len(calls) == 2  # forward, and once more in the backward pass
    assert torch.equal(loss, again)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_one_block_is_compiled_for_all_and_for_every_length(small_model):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = small_model().train()
    plain = [run_backward(model, shape) for shape in SHAPES]
    names, noise = list(model.state_dict()), torch.get_rng_state()
    compile_blocks(model, CONFIG, backend="eager")
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert model.training and list(model.state_dict()) == names
    assert torch.equal(torch.get_rng_state(), noise)
    for shape, (loss, wanted) in zip(SHAPES, plain, strict=True):
        found_loss, found = run_backward(model, shape)
        torch.testing.assert_close(found_loss, loss, atol=1e-5, rtol=0)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=0)
    assert made == 2  # with gradients and without, not one for every layer
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
def test_a_compiled_run_saves_plain_weights_and_its_compile_time(tmp_path, capsys):
    settings = {
        **SMALL, "data_path": write_lines(tmp_path / "pretrain.jsonl", texts()), "epochs": 1, "device": "cpu",
        "tokenizer_path": str(data_samples("tokenizer.json")), "out_dir": str(tmp_path / "plain"),
    }  # fmt: skip
    plain = minimind.train("pretrain", **settings)
    settings |= {"compile": 1, "gradient_checkpointing": 1}
    fast = minimind.train("pretrain", **{**settings, "out_dir": str(tmp_path / "fast")})
    assert "Compiled in" in capsys.readouterr().out
    weights, other = read_tensors(plain.weight_path), read_tensors(fast.weight_path)
    assert list(weights) == list(other)
    point = read_tensors(tmp_path / "fast/checkpoints/pretrain_32_resume.pth")
    assert list(point["model"]) == list(weights)
    sidecar = json.loads(fast.weight_path.with_suffix(".json").read_text())
    assert sidecar["metrics"]["compile_seconds"] >= 0
    losses = [[row["loss"] for row in run.history] for run in (plain, fast)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_machine_without_a_compiler_says_so(small_model, monkeypatch):
    torch._dynamo.reset()
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        compile_blocks(small_model(), CONFIG)
    torch._dynamo.reset()
