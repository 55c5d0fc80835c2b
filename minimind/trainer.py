"""The one training loop, for every stage.

A run is a pure function of its settings: step s uses batches s·k … s·k+k-1 of a stream that can be
sought, and a learning rate that depends on s alone. So a resume point needs only the weights, the
optimizer, the step and the random states, and a resumed run is bit-identical to an unbroken one.
With N processes (`distributed.py`) a step uses N·k batches of the same stream, every N-th by each.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import ceil, cos, isfinite, pi
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from minimind import distributed
from minimind.checkpoint import (
    load_model,
    load_state,
    read_tensors,
    save_weight,
    starting_weight,
    weight_path,
    write_atomically,
)
from minimind.config import ModelConfig, TrainConfig, stage_config
from minimind.data import Batch, Batches
from minimind.errors import UserError
from minimind.model import MiniMind
from minimind.precision import autocast
from minimind.stages import NEEDS, STAGES
from minimind.stages.task import Metrics, Task
from minimind.tokenizer import Tokenizer
from minimind.tracking import Row, start_trackers

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
    """The state of a run: everything the next step depends on, and what it has logged."""

    model: MiniMind
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    step: int = 0
    history: list[Row] = field(default_factory=list)


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
    """
    return train_config(stage, stage_config(stage, preset, **settings), callback)


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
    model, tokenizer, lineage = starting_point(config)
    task = STAGES[stage](config, model.to(device), tokenizer)
    for fault, count in task.warnings.items():
        distributed.say(f"Warning: {count} x {fault}")
    if config.fsdp:
        distributed.shard(model, stage, config.optimizer, config.dtype)
    batches = Batches(task.train, config.batch_size, config.seed, task.collate, task.lengths)
    run = Run(model.train(), make_optimizers(model, config), make_scaler(config, device))

    name = f"{config.save_weight}_{model.config.hidden_size}"
    resume_path = config.checkpoint_dir / f"{name}_resume.pth"
    if config.from_resume and resume_path.exists():
        restore(run, task, resume_path, config)
    distributed.own_noise(config.seed, run.step)

    started = time.monotonic()
    fit(run, task, batches, config, name, resume_path, callback)
    metrics = final_metrics(run, task, config, time.monotonic() - started)

    path = weight_path(config.out_dir, config.save_weight, model.config.hidden_size)
    lineage = [*lineage, {"stage": stage, "settings": asdict(config), "steps": run.step}]
    model = distributed.unsharded(model)
    if distributed.is_first():
        save_weight(path, model, tokenizer, lineage, metrics, task.saved, task.sidecar)
    distributed.wait()  # a stage that follows reads it
    return TrainResult(run.history, metrics, path, model.eval(), tokenizer)


def fit(run: Run, task: Task, batches: Batches, config: TrainConfig, name: str, resume_path: Path,
        callback: Callback | None = None) -> None:  # fmt: skip
    """Take all steps that are left; log, measure and write resume points on the way."""
    total_batches = max(1, ceil(config.epochs * batches.per_epoch))
    k = config.accumulation_steps * distributed.size()
    total_steps = ceil(total_batches / k)
    first = distributed.is_first()
    trackers = start_trackers(config, name, run.history) if first else []
    progress = tqdm(total=total_steps, initial=run.step, desc=name, unit="step", mininterval=1.0,
                    disable=not first)  # fmt: skip
    tokens, rolling, since, figures = 0, 0.0, time.monotonic(), []
    if callback and run.step == 0:
        callback(0, run.model)

    while run.step < total_steps:
        numbers = range(run.step * k, min((run.step + 1) * k, total_batches))
        lr = learning_rate(run.step, total_steps, config.learning_rate, config.warmup_steps)
        if task.rollout:  # shares its prompts out itself
            began = time.monotonic()
            updates, rolled = task.rollout(run.model, [batches[m] for m in numbers], run.step)
            rolling += time.monotonic() - began
        else:
            updates, rolled = [distributed.shared(batches, numbers)], {}
        for update in updates:
            loss, metrics, grad_norm = optimizer_step(run, update, task, lr, config)
        run.step += 1
        progress.update()
        tokens += sum(batch["input_ids"].numel() for update in updates for batch in update)
        figures.append({**rolled, **metrics})

        last = run.step == total_steps
        if run.step % config.log_interval == 0 or last or run.step == 1:
            row = {"step": run.step, "total_steps": total_steps, "loss": check_finite(loss, run.step),
                   "lr": lr, "grad_norm": float(grad_norm), **mean_figures(figures)}  # fmt: skip
            if config.eval_interval and (
                run.step % config.eval_interval == 0 or last or run.step == 1
            ):
                row["heldout_loss"] = heldout_loss(run.model, task, config)
            row["tokens_per_second"] = round(distributed.total(tokens) / (time.monotonic() - since))
            if task.rollout:
                row["rollout_share"] = round(rolling / (time.monotonic() - since), 3)
            run.history.append(row)
            for log in trackers:
                log(row)
            progress.set_postfix(loss=f"{row['loss']:.3f}", lr=f"{lr:.1e}", refresh=False)
            tokens, rolling, since, figures = 0, 0.0, time.monotonic(), []
        if callback:
            callback(run.step, run.model)
        if run.step % config.save_interval == 0 or last:
            save_resume(run, task, resume_path, config)
    progress.close()


def mean_figures(figures: list[dict[str, Tensor | float]]) -> dict[str, float]:
    """Return the mean of every figure over the steps since the last row of the log."""
    names = {name for step in figures for name in step}
    values = {name: [float(step[name]) for step in figures if name in step] for name in names}
    return {name: sum(found) / len(found) for name, found in sorted(values.items())}


def optimizer_step(
    run: Run, group: list[Batch], task: Task, lr: float, config: TrainConfig
) -> tuple[Tensor, Metrics, Tensor]:
    """One step on a group of batches; return loss and metrics over all of them, and the gradient's norm.

    Each batch's means are weighted by its share of what is counted in the whole group, which is
    that of all processes.
    """
    device = run.model.device
    counts = [0 if "idle" in batch else task.count(batch) for batch in group]
    total = max(1, distributed.total(sum(counts)))
    loss_sum, metrics = torch.zeros((), device=device), Counter()
    for batch, count in zip(group, counts, strict=True):
        share = count / total
        on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with autocast(config, device):
            loss, found = task.loss(run.model, on_device)
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
    for optimizer in run.optimizers:
        run.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    run.scaler.update()
    return figures.pop("loss"), figures, grad_norm


def learning_rate(step: int, total_steps: int, peak: float, warmup_steps: int = 0) -> float:
    """peak·(0.1 + 0.45·(1 + cos(π·step/total_steps))), times a linear warm-up.

    Starts at `peak` (or at peak/warmup_steps), ends at a tenth of it.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return peak * warmup * (0.1 + 0.45 * (1 + cos(pi * step / total_steps)))


def check_finite(loss: Tensor, step: int) -> float:
    """Return the loss as a number. UserError if it is NaN or infinite."""
    value = float(loss)
    if not isfinite(value):
        raise UserError(
            f"The loss of step {step} is {value}. Lower learning_rate, keep grad_clip at 1, or use "
            "dtype=float32. The last resume point is from before."
        )
    return value


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
    metrics = {
        "loss": run.history[-1]["loss"],
        "seconds": round(seconds, 1),
        "steps": run.step,
        **task.warnings,
    }
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

    With `optimizer="muon"` the matrices of the blocks get Muon (arXiv 2502.16982) instead, which
    makes each update orthogonal, scaled to the size of AdamW's so that one learning rate serves
    both. Embeddings, whose rows are not a linear map, stay with AdamW.
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
        scale = "match_rms_adamw"
        optimizers.append(torch.optim.Muon(hidden, lr=lr, weight_decay=decay, adjust_lr_fn=scale))
    return optimizers


def make_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """Scale the loss so that float16 gradients do not vanish; does nothing in other dtypes."""
    return torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")


def starting_point(config: TrainConfig) -> tuple[MiniMind, Tokenizer, list[dict]]:
    """Return the model to train, its tokenizer, and the stages it has been through."""
    if config.from_weight == "none":
        tokenizer = Tokenizer.load(config.tokenizer_path)
        return MiniMind(model_config(config, tokenizer.vocab_size)), tokenizer, []
    path = starting_weight(config)
    model, sidecar = load_model(path)
    tokenizer = Tokenizer.from_json(json.dumps(sidecar["tokenizer"]))
    check_shape(model.config, config, path)
    return model, tokenizer, sidecar["stages"]


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
_FREE_TO_CHANGE = {"from_resume", "save_interval", "log_interval", "eval_interval", "out_dir", "device", "fsdp",
                   "use_wandb", "wandb_project"}  # fmt: skip


def lasting_settings(config: TrainConfig) -> dict:
    """Return the settings that a resume point belongs to: accumulation counted over all processes."""
    return {**asdict(config), "accumulation_steps": config.accumulation_steps * distributed.size()}


def save_resume(run: Run, task: Task, path: Path, config: TrainConfig) -> None:
    """Write the resume point: float32 weights, optimizer, step, random states, log."""
    device = run.model.device
    point = {
        "model": distributed.whole(run.model.state_dict()),
        "optimizers": [distributed.whole(o.state_dict()) for o in run.optimizers],
        "scaler": run.scaler.state_dict(),
        "step": run.step,
        "memory": task.memory.state_dict() if task.memory else {},
        "history": run.history,
        "settings": lasting_settings(config),
        "random": {
            "cpu": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
        },
    }
    if distributed.is_first():
        write_atomically(path, lambda file: torch.save(point, file))


def restore(run: Run, task: Task, path: Path, config: TrainConfig) -> None:
    """Put a run back to its resume point. UserError if that belongs to other settings."""
    point = read_tensors(path)
    changed = [f"{name} was {point['settings'].get(name)!r} and is {value!r}"
               for name, value in lasting_settings(config).items()
               if name not in _FREE_TO_CHANGE and point["settings"].get(name) != value]  # fmt: skip
    if changed:
        raise UserError(
            f"{path} belongs to a run with other settings: {'; '.join(changed)}. Give the same "
            "settings (accumulation_steps counts those of all processes together), or from_resume=0 "
            "to start anew."
        )
    load_state(run.model, distributed.share_weights(point["model"], run.model), path)
    for optimizer, state in zip(run.optimizers, point["optimizers"], strict=True):
        optimizer.load_state_dict(state)
        distributed.share_states(optimizer)
    run.scaler.load_state_dict(point["scaler"])
    if task.memory:
        task.memory.load_state_dict(point["memory"])
    run.step, run.history = point["step"], point["history"]
    torch.set_rng_state(point["random"]["cpu"])
    if point["random"]["cuda"] and run.model.device.type == "cuda":
        torch.cuda.set_rng_state(point["random"]["cuda"][0], run.model.device)
