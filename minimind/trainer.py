"""The one training loop, for every stage.

A run is a pure function of its settings: step s uses batches s·k … s·k+k-1 of a stream that can be
sought, and a learning rate that depends on s alone. So a resume point needs only the weights, the
optimizer, the step and the random states, and a resumed run is bit-identical to an unbroken one.
With N processes (`distributed.py`) a step uses N·k batches of the same stream, every N-th by each.
Ctrl-C and SIGTERM end a run with such a point; what else ends it stands in `guard.py`.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass, field
from math import ceil, cos, pi
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from minimind import checkpoint, distributed
from minimind.compiling import compile_blocks
from minimind.config import ModelConfig, TrainConfig, stage_config
from minimind.corpus import source_sha256
from minimind.data import Batch, Batches
from minimind.errors import UserError
from minimind.feed import one_ahead, to_device
from minimind.guard import Interrupted, Signals, Watch, diagnosis, not_finite
from minimind.model import MiniMind
from minimind.muon import Muon
from minimind.precision import autocast
from minimind.stages import NEEDS, STAGES, TOKENIZERS
from minimind.stages.pretrain import count_labels
from minimind.stages.task import Metrics, Task
from minimind.tokenizer import Tokenizer
from minimind.tracking import Row, postfix, start_trackers

Callback = Callable[[int, MiniMind], None]


@dataclass
class TrainResult:
    """What a run leaves: `history` has one row per logged step, `metrics` the last figures."""

    history: list[Row]
    metrics: dict[str, float]
    weight_path: Path
    model: MiniMind
    tokenizer: Tokenizer


@dataclass
class Run:
    """The state of a run: everything the next step depends on, and what it has logged.

    Attributes:
        data: sha256 of the training data.
        watch: the figures of the last steps.
        saved_step: the step of the resume point; 0 if there is none.
        tracker_id: under which a resumed run is found again by its tracker.
    """

    model: MiniMind
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    data: str = ""
    step: int = 0
    history: list[Row] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)
    saved_step: int = 0
    tracker_id: str = field(default_factory=lambda: secrets.token_hex(4))


def train(
    stage: str, preset: str = "full", callback: Callback | None = None, **settings: object
) -> TrainResult:
    """Train one stage and save its weight.

    Args:
        stage: one of `pretrain sft lora dpo reward reason grpo spo distill`.
        preset: "tiny", "course" or "full".
        callback: called as `callback(step, model)` before the first step and after every step;
            for measurements along the way.
        settings: any field of the stage's config, such as `epochs=2, learning_rate=1e-3`.

    Raises:
        UserError: an unknown name, data or a weight that does not fit, a loss that is not finite.
        Interrupted: Ctrl-C (in a notebook: interrupt the kernel) or SIGTERM; a resume point was
            written, and the message is the call that goes on.
    """
    try:
        return train_config(stage, stage_config(stage, preset, **settings), callback)
    except Interrupted as stop:
        given = {"preset": preset, **settings, "from_resume": 1}
        stop.go_on = f"train({', '.join([repr(stage), *(f'{n}={v!r}' for n, v in given.items())])})"
        raise


def train_config(stage: str, config: TrainConfig, callback: Callback | None = None) -> TrainResult:
    """Train one stage from a complete config; `train` is this with a preset."""
    distributed.start()
    for needed, settings in NEEDS[stage](config) if stage in NEEDS else []:
        distributed.say(
            f"{stage} needs {settings.save_weight}_{settings.hidden_size} first: {needed} starts."
        )
        train_config(needed, settings)
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    model, tokenizer, lineage = starting_point(stage, config)
    task = STAGES[stage](config, model.to(device), tokenizer)
    for fault, count in task.warnings.items():
        distributed.say(f"Warning: {count} x {fault}")
    if config.fsdp:
        distributed.shard(model, stage, config.optimizer, config.dtype)
    batches = Batches(task.train, config.batch_size, config.seed, task.collate, task.lengths)
    data = getattr(task.train, "sha256", None) or source_sha256(config.data_path)
    run = Run(model.train(), make_optimizers(model, config), make_scaler(config, device), data)

    name = f"{config.save_weight}_{model.config.hidden_size}"
    resume_path = config.checkpoint_dir / f"{name}_resume.pth"
    if config.from_resume:
        go_on(run, task, resume_path, config)
    distributed.own_noise(config.seed, run.step)

    compiled = make_faster(model, config)
    started = time.monotonic()
    fit(run, task, batches, config, name, resume_path, callback)
    metrics = {**final_metrics(run, task, config, time.monotonic() - started), **compiled}

    path = checkpoint.weight_path(config.out_dir, config.save_weight, model.config.hidden_size)
    lineage = [*lineage, {"stage": stage, "settings": asdict(config), "steps": run.step}]
    model = distributed.unsharded(model)
    if distributed.is_first():
        checkpoint.save_weight(path, model, tokenizer, lineage, metrics, task.saved, task.sidecar)
    distributed.wait()  # a stage that follows reads it
    return TrainResult(run.history, metrics, path, model.eval(), tokenizer)


def make_faster(model: MiniMind, config: TrainConfig) -> dict[str, float]:
    """Do what the settings say about memory and speed; return the seconds of compiling, if any."""
    model.model.gradient_checkpointing = bool(config.gradient_checkpointing)
    if not config.compile:
        return {}
    seconds = round(compile_blocks(model, config), 1)
    distributed.say(f"Compiled in {seconds} s, which are not part of the time of any step.")
    return {"compile_seconds": seconds}


def fit(run: Run, task: Task, batches: Batches, config: TrainConfig, name: str, resume_path: Path,
        callback: Callback | None = None) -> None:  # fmt: skip
    """Take all steps that are left; log, measure and write resume points on the way.

    Raises:
        UserError: a loss, gradient or weight that is not finite, or a loss that explodes.
        Interrupted: a signal came; the step was finished and its resume point written.
    """
    total_batches = max(1, ceil(config.epochs * batches.per_epoch))
    k = config.accumulation_steps * distributed.size()
    total_steps = ceil(total_batches / k)
    first = distributed.is_first()
    trackers = start_trackers(config, name, run.tracker_id, run.history) if first else []
    pace = Pace()
    if callback and run.step == 0:
        callback(0, run.model)

    source = copy(batches)  # for the thread that makes batches ahead

    def group_of(step: int) -> list[Batch]:
        numbers = range(step * k, min((step + 1) * k, total_batches))
        if task.rollout:  # shares its prompts out itself
            return [source[m] for m in numbers]
        return distributed.shared(source, numbers)

    def examples_of(step: int) -> list[int]:
        numbers = range((step - 1) * k, min(step * k, total_batches))
        return [] if task.rollout else [i for m in numbers for i in batches.rows(m)]

    with (
        Signals() as signals,
        tqdm(total=total_steps, initial=run.step, desc=name, unit="step", mininterval=1.0, disable=not first) as progress,
    ):  # fmt: skip
        for group in one_ahead(group_of, range(run.step, total_steps), run.model.device):
            lr = learning_rate(run.step, total_steps, config.learning_rate, config.warmup_steps)
            take_step(run, task, group, lr, config, pace)
            progress.update()

            last, stopping = run.step == total_steps, distributed.largest(signals.received)
            logging = run.step % config.log_interval == 0 or last or run.step == 1
            saving = run.step % config.save_interval == 0 or last or bool(stopping)
            if logging or saving or run.model.device.type == "cpu":
                check_finite(run, config, examples_of, with_weights=saving)
            if logging:
                row = log_row(run, task, config, total_steps, pace)
                for log in trackers:
                    log(row)
                progress.set_postfix(postfix(run.history), refresh=False)
                pace = Pace()
            if callback:
                callback(run.step, run.model)
            if saving:
                save_resume(run, task, resume_path, config, must=bool(stopping))
            if stopping:
                break
    if stopping := distributed.largest(signals.received):
        raise Interrupted(stopping, run.step, total_steps, resume_path)


@dataclass
class Pace:
    """What was done since the last row of the log: labels trained on, seconds of sampling."""

    tokens: int = 0
    rolling: float = 0.0
    since: float = field(default_factory=time.monotonic)


def take_step(
    run: Run, task: Task, group: list[Batch], lr: float, config: TrainConfig, pace: Pace
) -> None:
    """One step on a group of batches; in RL first sample answers to them. Figures go to `watch`."""
    updates, rolled = [group], {}
    if task.rollout:
        began = time.monotonic()
        updates, rolled = task.rollout(run.model, group, run.step)
        pace.rolling += time.monotonic() - began
    run.step += 1
    for update in updates:
        limit = run.watch.limit
        loss, metrics, grad_norm = optimizer_step(run, update, task, lr, config)
        figures = {"step": run.step, "lr": lr, "loss": loss, "grad_norm": grad_norm, "limit": limit}
        run.watch.pending.append(figures)
        pace.tokens += sum(count_labels(batch) for batch in update if "idle" not in batch)
    figures.update({**rolled, **metrics})


def log_row(run: Run, task: Task, config: TrainConfig, total_steps: int, pace: Pace) -> Row:
    """Add a row to the history and return it.

    `tokens_per_second` counts the tokens with a label, of all processes, and the seconds since the
    last row: sampling and saving are among them, measuring the held-out loss is not.
    """
    row = {"step": run.step, "total_steps": total_steps, **run.watch.row()}
    seconds = time.monotonic() - pace.since
    last = run.step == total_steps
    if config.eval_interval and (run.step % config.eval_interval == 0 or last or run.step == 1):
        row["heldout_loss"] = heldout_loss(run.model, task, config)
    row["tokens_per_second"] = round(distributed.total(pace.tokens) / seconds)
    if task.rollout:
        row["rollout_share"] = round(pace.rolling / seconds, 3)
    run.history.append(row)
    return row


def optimizer_step(
    run: Run, group: list[Batch], task: Task, lr: float, config: TrainConfig
) -> tuple[Tensor, Metrics, Tensor]:
    """One step on a group of batches; return loss and metrics over all of them, and the gradient's norm.

    A gradient that is not finite, or a loss beyond the watch's limit, leaves everything as it is.
    Each batch's means are weighted by its share of what is counted in the whole group, which is
    that of all processes.
    """
    device = run.model.device
    counts = [0 if "idle" in batch else task.count(batch) for batch in group]
    total = max(1, distributed.total(sum(counts)))
    loss_sum, metrics = torch.zeros((), device=device), Counter()
    for batch, count in zip(group, counts, strict=True):
        share = count / total
        with autocast(config, device):
            loss, found = task.loss(run.model, to_device(batch, device))
        run.scaler.scale(loss * share).backward()
        loss_sum += loss.detach() * share
        for metric, value in found.items():
            metrics[metric] += value.detach() * share

    distributed.sum_gradients(run.model)
    figures = distributed.sum_figures({"loss": loss_sum, **metrics})
    for optimizer in run.optimizers:
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        run.scaler.unscale_(optimizer)
    limit = config.grad_clip or float("inf")
    grad_norm = distributed.whole(torch.nn.utils.clip_grad_norm_(run.model.parameters(), limit))
    loss = figures.pop("loss")
    good = grad_norm.isfinite() & loss.isfinite() & (loss <= run.watch.limit)
    step_unless(~good, run.optimizers)
    run.scaler.update()
    return loss, figures, grad_norm


def step_unless(bad: Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
    """Update the weights, or with `bad` (a bool, on the device) leave them and all momenta as they are.

    PyTorch's fused optimizers look at `found_inf` on the device, so a GPU does not wait for the
    host; others ask the host. `GradScaler.step` would ask for each optimizer by itself, and one
    could step while another does not.
    """
    for optimizer in optimizers:
        on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        sharded = distributed.is_share(optimizer.param_groups[0]["params"][0])  # it wants all alike
        if on_device and not sharded and bad.device.type != "mps":
            optimizer.grad_scale, optimizer.found_inf = None, bad.float()
            optimizer.step()
        elif not bad:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def learning_rate(step: int, total_steps: int, peak: float, warmup_steps: int = 0) -> float:
    """peak·(0.1 + 0.45·(1 + cos(π·step/total_steps))), times a linear warm-up.

    Starts at `peak` (or at peak/warmup_steps), ends at a tenth of it.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return peak * warmup * (0.1 + 0.45 * (1 + cos(pi * step / total_steps)))


def check_finite(
    run: Run,
    config: TrainConfig,
    examples_of: Callable[[int], list[int]],
    with_weights: bool = False,
) -> None:
    """UserError with a diagnosis if the run must not go on or, `with_weights`, not be saved.

    Args:
        examples_of: a step to the numbers of the examples in its batches.
    """
    found = run.watch.look(config)
    if not found and with_weights and not_finite(run.model):
        found = "the weights have overflowed", run.watch.pending[-1]
    if found:
        why, figures = found
        examples = examples_of(int(figures["step"]))
        raise diagnosis(why, figures, examples, run.model, config, run.watch, run.saved_step)


@torch.no_grad()
def heldout_loss(model: MiniMind, task: Task, config: TrainConfig, limit: int = 16) -> float:
    """Mean loss over (at most `limit` batches of) the held-out examples."""
    was_training = model.training
    model.eval()
    loss_sum = counted = 0.0
    size = config.batch_size
    for start in range(0, min(len(task.heldout), limit * size), size):
        examples = [task.heldout[i] for i in range(start, min(start + size, len(task.heldout)))]
        batch = {name: tensor.to(model.device) for name, tensor in task.collate(examples).items()}
        count = task.count(batch)
        with autocast(config, model.device):
            loss_sum += float(task.loss(model, batch)[0]) * count
        counted += count
    model.train(was_training)
    return loss_sum / max(counted, 1)


def final_metrics(run: Run, task: Task, config: TrainConfig, seconds: float) -> dict[str, float]:
    """Return the figures that are stored with the weight."""
    metrics = {"loss": run.history[-1]["loss"], "seconds": round(seconds, 1), "steps": run.step}
    metrics |= task.warnings
    if run.watch.skipped:
        metrics["skipped_steps"] = run.watch.skipped
    if len(task.heldout):
        metrics["heldout_loss"] = heldout_loss(run.model, task, config)
    return metrics


def pick_device(name: str) -> torch.device:
    """Return the device; "auto" is CUDA if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = distributed.own_device(name)
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device={name!r} cannot be used here ({str(error).splitlines()[0]}). Try cpu."
        ) from error


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW (arXiv 1711.05101); norms and other vectors are not decayed.

    With `optimizer="muon"` the matrices of the blocks get Muon instead. Embeddings, whose rows are
    not a linear map, stay with AdamW.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = [
        p for n, p in trained.items() if p.ndim == 2 and "embed" not in n and "lm_head" not in n
    ]
    others = [p for n, p in trained.items() if p.ndim >= 2 and ("embed" in n or "lm_head" in n)]
    vectors = [p for p in trained.values() if p.ndim < 2]
    lr, decay = config.learning_rate, config.weight_decay
    muon = config.optimizer == "muon"
    groups = [
        {"params": others if muon else hidden + others, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, config.adam_beta2), fused=True)]
    if muon:
        optimizers.append(Muon(hidden, lr=lr, weight_decay=decay))
    return optimizers


def make_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """Scale the loss so that float16 gradients do not vanish; does nothing in other dtypes."""
    return torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")


def starting_point(stage: str, config: TrainConfig) -> tuple[MiniMind, Tokenizer, list[dict]]:
    """Return the model to train, its tokenizer, and the stages it has been through."""
    tokenizer = starting_tokenizer(stage, config)
    if config.from_weight == "none":
        return MiniMind(model_config(config, tokenizer.vocab_size)), tokenizer, []
    path = checkpoint.starting_weight(config)
    model, sidecar = checkpoint.load_model(path)
    check_shape(model.config, config, path)
    return model, tokenizer, sidecar["stages"]


def starting_tokenizer(stage: str, config: TrainConfig) -> Tokenizer:
    """Return the tokenizer of a run: its weight's, else the one that is given, else the stage's own.

    UserError if there is none of them.
    """
    if config.from_weight != "none":
        sidecar = checkpoint.load_sidecar(checkpoint.starting_weight(config))
        return Tokenizer.from_json(json.dumps(sidecar["tokenizer"]))
    if not config.tokenizer_path and stage in TOKENIZERS:
        return TOKENIZERS[stage](config)
    if not config.tokenizer_path:
        raise UserError(
            f"{stage} from nothing has no tokenizer. Give tokenizer_path or from_weight."
        )
    return Tokenizer.load(config.tokenizer_path)


SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rope_theta",
         "qk_norm", "use_moe")  # fmt: skip


def model_config(config: TrainConfig, vocab_size: int) -> ModelConfig:
    """Return the model's config from the settings of a stage."""
    shape = {name: getattr(config, name) for name in SHAPE}
    return ModelConfig(**{**shape, "use_moe": bool(config.use_moe)}, vocab_size=vocab_size)


def check_shape(model: ModelConfig, config: TrainConfig, path: Path) -> None:
    """UserError if the settings ask for another shape than the weight they start from has."""
    wrong = [f"{n}={getattr(config, n)} (the weight has {getattr(model, n)})" for n in SHAPE
             if getattr(config, n) != getattr(model, n)]  # fmt: skip
    if wrong:
        raise UserError(
            f"{path} does not fit: {', '.join(wrong)}. Give the weight's own values or another from_weight."
        )


# Settings that may differ between the two halves of a run without changing its outcome.
_FREE_TO_CHANGE = {"data_path", "eval_data_path", "out_dir", "device", "fsdp", "from_resume", "save_interval",
                   "log_interval", "eval_interval", "tracker", "use_wandb", "wandb_project", "skip_bad_steps",
                   "gradient_checkpointing"}  # fmt: skip


def lasting_settings(config: TrainConfig) -> dict:
    """Return the settings that a resume point belongs to: accumulation counted over all processes."""
    return {**asdict(config), "accumulation_steps": config.accumulation_steps * distributed.size()}


def save_resume(run: Run, task: Task, path: Path, config: TrainConfig, must: bool = False) -> None:
    """Write the resume point: float32 weights, optimizer, step, random states, log.

    A disk that is full now may have room at the next save, so the run goes on with a warning; the
    points written before are unharmed. With `must` there is no next save, and it is a UserError.
    """
    device = run.model.device
    point = {
        "model": distributed.whole(run.model.state_dict()),
        "optimizers": [distributed.whole(o.state_dict()) for o in run.optimizers],
        "scaler": run.scaler.state_dict(),
        "step": run.step,
        "memory": task.memory.state_dict() if task.memory else {},
        "history": run.history,
        "watch": vars(run.watch),
        "tracker_id": run.tracker_id,
        "settings": lasting_settings(config),
        "data": run.data,
        "random": {
            "cpu": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
        },
    }
    try:
        if distributed.is_first():
            checkpoint.write_resume(path, point)
        run.saved_step = run.step
    except UserError as error:
        if must:
            raise
        tqdm.write(f"Warning: {error} Training goes on; the next save tries again.")


def go_on(run: Run, task: Task, path: Path, config: TrainConfig) -> None:
    """Put a run back to its newest resume point, if there is one.

    UserError if it is of other settings or data, or the processes do not find the same one.
    """
    found = checkpoint.newest_resume(path)
    if found:
        restore(run, task, *found, config)
    distributed.check_same_step(run.step, path.parent)
    if found and found[1] != path and distributed.is_first():
        os.replace(found[1], path)  # else the next save would keep the damaged one, and not this


def restore(run: Run, task: Task, point: dict, path: Path, config: TrainConfig) -> None:
    """Put a run back to a resume point read from `path`. UserError if it is of other settings or data."""
    changed = [f"{name} was {point['settings'].get(name)!r} and is {value!r}"
               for name, value in lasting_settings(config).items()
               if name not in _FREE_TO_CHANGE and point["settings"].get(name) != value]  # fmt: skip
    if changed:
        raise UserError(
            f"{path} belongs to a run with other settings: {'; '.join(changed)}. Give the same "
            "settings (accumulation_steps counts those of all processes together), or from_resume=0 "
            "to start anew."
        )
    if point.get("data") != run.data:
        raise UserError(
            f"{path} belongs to a run on other data (then in {point['settings']['data_path']}) than "
            f"{config.data_path} holds now. Give that data, under any name, or from_resume=0 to start anew."
        )
    checkpoint.load_state(run.model, distributed.share_weights(point["model"], run.model), path)
    for optimizer, state in zip(run.optimizers, point["optimizers"], strict=True):
        optimizer.load_state_dict(state)
        distributed.share_states(optimizer)
    run.scaler.load_state_dict(point["scaler"])
    if task.memory:
        task.memory.load_state_dict(point["memory"])
    run.step = run.saved_step = point["step"]
    run.history, run.watch, run.tracker_id = point["history"], Watch(**point["watch"]), point["tracker_id"]  # fmt: skip
    torch.set_rng_state(point["random"]["cpu"])
    if point["random"]["cuda"] and run.model.device.type == "cuda":
        torch.cuda.set_rng_state(point["random"]["cuda"][0], run.model.device)
