import json
import math
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import SMALL, chats, texts, write_lines
from torch.utils._python_dispatch import TorchDispatchMode

import minimind
from minimind import UserError, trainer
from minimind.checkpoint import read_tensors, save_weight
from minimind.config import data_samples, stage_config
from minimind.data import pad_batch
from minimind.feed import to_device
from minimind.losses import labelled_places
from minimind.stages import STAGES
from minimind.stages.pretrain import count_labels, language_model_loss, pretrain_task
from minimind.stages.task import Task
from minimind.trainer import (
    Run,
    learning_rate,
    make_optimizers,
    make_scaler,
    optimizer_step,
    starting_point,
)

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


def test_the_full_preset_is_the_guides_model(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 9))) for _ in range(4000)]
    rows = [{"text": " ".join(rng.choices(words, k=50))} for _ in range(400)]
    config = stage_config("pretrain", data_path=write_lines(tmp_path / "text.jsonl", rows))
    model, tokenizer, _ = starting_point("pretrain", config)
    assert (tokenizer.vocab_size, model.num_parameters) == (6400, 25_829_888)


def test_no_stage_after_pretraining_is_told_the_tokenizer(tmp_path):
    settings = {
        n: v for n, v in settings_for(tmp_path, epochs=0.2).items() if n != "tokenizer_path"
    }
    chat_path = write_lines(tmp_path / "chats.jsonl", chats())
    first = minimind.train("pretrain", **settings).tokenizer
    assert first.vocab_size < 1536  # its own, not the course's
    result = minimind.train("sft", **{**settings, "data_path": chat_path})
    model, tokenizer = minimind.load("full_sft", settings["out_dir"])
    assert result.tokenizer.to_json() == tokenizer.to_json() == first.to_json()
    question = [{"role": "user", "content": "say na"}]
    assert isinstance(minimind.chat(model, tokenizer, question, max_new_tokens=4), str)
    student = {n: v for n, v in settings.items() if n not in ("hidden_size", "num_hidden_layers")}
    student |= {"data_path": chat_path, "student_hidden_size": 16, "student_num_layers": 1,
                "teacher_hidden_size": 32, "teacher_num_layers": 2}  # fmt: skip
    assert minimind.train("distill", **student).tokenizer.to_json() == first.to_json()
    with pytest.raises(UserError, match=r"sft from nothing has no tokenizer\. Give tokenizer_path"):
        minimind.train("sft", **{**settings, "data_path": chat_path, "from_weight": "none"})


class Waiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device: reading a value, counting, copying back."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
            torch.ops.aten.is_nonzero, torch.ops.aten.equal,
        ), func  # fmt: skip
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put):
            places = [index for index in args[1] if index is not None]
            assert not any(index.dtype in (torch.bool, torch.uint8) for index in places), func
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


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("stage", ["pretrain", "sft", "lora", "dpo", "reward", "reason", "distill"])
def test_no_loss_waits_for_the_device(stage, large, small_model, tokenizer, tmp_path, monkeypatch):
    if large:
        monkeypatch.setattr("minimind.losses.SMALL", 0)
        monkeypatch.setattr("minimind.losses.ONE_CHUNK", 20 * tokenizer.vocab_size)
    model = small_model(vocab_size=tokenizer.vocab_size)
    base = tmp_path / "full_sft_64.pth"
    save_weight(base, model, tokenizer, [], {})
    start = {"from_weight": str(base)}
    if stage == "distill":
        start = {"teacher_hidden_size": 64, "teacher_num_layers": 3, "student_num_layers": 3}
    config = stage_config(stage, "tiny", **start, out_dir=str(tmp_path), eval_data_path="")
    task = STAGES[stage](config, model, tokenizer)
    batch = to_device(task.collate([task.train[i] for i in range(4)]), model.device)
    with Waiting():
        task.loss(model.train(), batch)[0].backward()
        with pytest.raises(AssertionError):
            batch["labels"][batch["labels"] > 0]


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


def test_a_resume_point_of_other_settings_is_refused(tmp_path):
    settings = settings_for(tmp_path, epochs=1)
    minimind.train("pretrain", **settings)
    with pytest.raises(UserError, match=r"learning_rate was 0.001 and is 0.002"):
        minimind.train("pretrain", **{**settings, "learning_rate": 2e-3, "from_resume": 1})


def test_a_run_knows_its_data_by_content_not_by_name(tmp_path, tokenizer):
    for stage, other in (("pretrain", texts(60, seed=5)), ("sft", chats(30, seed=5))):
        settings = settings_for(tmp_path, stage, from_weight="none", epochs=1)
        weight = minimind.train(stage, **settings).weight_path.read_bytes()
        path = Path(settings["data_path"])
        names = [str(shutil.copy(path, tmp_path / "copy.jsonl"))]
        if stage == "pretrain":
            names.append(str(minimind.corpus.prepare(path, tokenizer, tmp_path / "copy.tokens")))
        for name in names:
            again = minimind.train(stage, **{**settings, "data_path": name, "from_resume": 1})
            assert again.weight_path.read_bytes() == weight
        write_lines(path, other)
        with pytest.raises(
            UserError, match=rf"other data .*{path.name}.* holds now.*from_resume=0"
        ):
            minimind.train(stage, **settings, from_resume=1)


def test_the_speed_is_that_of_training_and_of_labels(small_model, monkeypatch):
    config = stage_config("sft", dtype="float32", device="cpu", eval_interval=1)
    run = Run(small_model(), [], make_scaler(config, torch.device("cpu")))
    labels = torch.tensor([[5, 5, 5, -100], [-100, -100, 5, 5]])  # the first 5 is never predicted
    batch = {"input_ids": labels.abs(), "labels": labels}
    step = torch.tensor(1.0), {}, torch.tensor(1.0)
    monkeypatch.setattr(trainer, "optimizer_step", lambda *_: step)
    monkeypatch.setattr(trainer, "heldout_loss", lambda *_: time.sleep(1) or 0.0)
    pace = trainer.Pace(since=time.monotonic() - 1)
    trainer.take_step(run, TASK, [batch, {**batch, "idle": torch.tensor(True)}], 1e-3, config, pace)
    assert pace.tokens == 4
    pace.tokens = 10_000
    row = trainer.log_row(run, TASK, config, 9, pace)
    assert row["heldout_loss"] == 0.0 and row["tokens_per_second"] > 7500  # 5000 with that second


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
    with pytest.raises(UserError, match="a learning_rate below"):
        minimind.train(
            "pretrain", **settings_for(tmp_path, learning_rate=1e12, grad_clip=0.0, epochs=9)
        )


def test_mixture_of_experts_trains(tmp_path):
    result = minimind.train(
        "pretrain", **settings_for(tmp_path, use_moe=1, epochs=4, learning_rate=3e-3)
    )
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.model.config.use_moe


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_matrix_products_run_in_the_dtype_that_was_asked_for(dtype, tmp_path):
    seen = {}

    def watch(step, model):
        if step == 0:
            for name in ("q_proj", "o_proj"):
                module = getattr(model.model.layers[0].self_attn, name)
                module.register_forward_hook(lambda m, i, out, n=name: seen.update({n: out.dtype}))
        elif step == 1:
            seen["weights"] = model.lm_head.weight.dtype

    minimind.train("pretrain", callback=watch, **settings_for(tmp_path, epochs=0.5, dtype=dtype))
    asked = getattr(torch, dtype)
    assert seen == {"q_proj": asked, "o_proj": asked, "weights": torch.float32}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_skips_what_overflows_and_resumes_with_its_scale(optimizer, tmp_path, monkeypatch):
    """The scaler starts far too high, so the first steps overflow and halve it."""
    start = 2.0**26
    monkeypatch.setattr(
        "minimind.trainer.make_scaler",
        lambda config, device: torch.amp.GradScaler(device.type, init_scale=start),
    )
    weights = []

    def keep(step, model):
        weights.append({n: t.clone() for n, t in model.state_dict().items()})
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    more = {"dtype": "float16", "optimizer": optimizer, "epochs": 4}
    whole = minimind.train("pretrain", **settings_for(tmp_path / "whole", **more))
    settings = settings_for(tmp_path / "parts", **more)
    with pytest.raises(KeyboardInterrupt):
        minimind.train("pretrain", callback=keep, **settings)
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])  # skipped whole
    point = read_tensors(tmp_path / "parts/out/checkpoints/pretrain_32_resume.pth")
    skipped = point["watch"]["skipped"]
    assert skipped >= 1 and point["scaler"]["scale"] == start / 2**skipped
    again = minimind.train("pretrain", **settings, from_resume=1)
    assert again.metrics["skipped_steps"] == whole.metrics["skipped_steps"] < 20
    found, wanted = (read_tensors(result.weight_path) for result in (again, whole))
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert again.history[-1]["loss"] < again.history[0]["loss"]


def test_an_overflow_in_one_optimizers_weights_stays_the_others_step(small_model):
    """Muon's matrices are fine, AdamW's embeddings overflow: neither may move, not even by decay."""
    config = stage_config("pretrain", device="cpu", dtype="float16", optimizer="muon")
    model = small_model()

    def loss(model, batch):
        matrices = sum(block.self_attn.q_proj.weight.sum() for block in model.model.layers)
        return model.model.embed_tokens.weight.sum() * 1e36 + matrices, {}

    task = Task([], [], [], list, loss, lambda batch: 1)
    run = Run(model, make_optimizers(model, config), make_scaler(config, model.device))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer_step(run, [{"input_ids": torch.zeros(1, 2)}], task, 1e-2, config)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert run.scaler.get_scale() == 2.0**15 and len(run.optimizers) == 2
