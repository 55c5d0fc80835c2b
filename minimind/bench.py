"""How fast a configuration trains and samples here: tokens per second, share of the peak, memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minimind.config import TrainConfig
from minimind.errors import UserError, needed
from minimind.generate import sample_rollouts
from minimind.interop import hf_config
from minimind.model import MiniMind
from minimind.precision import autocast, pick_dtype
from minimind.stages.pretrain import count_labels, language_model_loss
from minimind.stages.task import Task
from minimind.trainer import (
    Run,
    make_optimizers,
    make_scaler,
    model_config,
    optimizer_step,
    pick_device,
)


@dataclass
class Speed:
    """What `bench` measured. Memory is the peak of the process, or of the GPU, in MiB."""

    parameters: int
    dtype: str
    step_seconds: float
    tokens_per_second: float
    flops_per_token: float
    matmul_peak_flops: float
    utilisation: float
    peak_memory_mib: float


def flops_per_token(model: MiniMind, length: int) -> float:
    """Return the arithmetic of training on one token: 6 per parameter used, and attention.

    6·N counts two operations for each weight forward and four backward (arXiv 2001.08361, table 1,
    with the embedding look-up left out and the output projection in); 12·L·H·D·T is q·k and
    weights·v, half of which a causal mask saves.
    """
    c = model.config
    mlp = sum(p.numel() for n, p in model.named_parameters() if "experts" in n)
    used = (
        model.num_parameters
        - mlp
        + (mlp * c.num_experts_per_tok // c.num_experts if c.use_moe else 0)
    )
    if not c.tie_word_embeddings:
        used -= c.vocab_size * c.hidden_size
    return 6 * used + 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * length


def median_seconds(
    work: Callable[[], object], repeats: int, device: torch.device, warmup: int = 2
) -> float:
    """Return the median time of `work` over `repeats` runs, after `warmup` runs that do not count."""
    times = []
    for i in range(repeats + warmup):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= warmup:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Return the operations per second of a large matrix product: what this machine can do at best."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, 5, device)


def peak_memory(device: torch.device) -> float:
    """Return the peak memory so far in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def bench(config: TrainConfig, vocab_size: int = 6400, steps: int = 5) -> Speed:
    """Time training steps on random tokens: `batch_size` rows of `max_seq_len`."""
    device = pick_device(config.device)
    model = MiniMind(model_config(config, vocab_size)).to(device)
    ids = torch.randint(vocab_size, (config.batch_size, config.max_seq_len))
    batch = {"input_ids": ids, "labels": ids}
    run = Run(model, make_optimizers(model, config), make_scaler(config, device))
    task = Task([], [], [], list, language_model_loss, count_labels)
    seconds = median_seconds(
        lambda: optimizer_step(run, [batch], task, 1e-4, config), steps, device
    )
    memory = peak_memory(device)
    dtype = pick_dtype(config.dtype, device)
    speed, flops = ids.numel() / seconds, flops_per_token(model, config.max_seq_len)
    peak = matmul_peak(device, dtype)
    return Speed(model.num_parameters, str(dtype).removeprefix("torch."), seconds, speed, flops, peak,
                 flops * speed / peak, memory)  # fmt: skip


def bench_text(config: TrainConfig, speed: Speed) -> str:
    """Return the measurement as lines to print."""
    return "\n".join(
        [
            f"model           {speed.parameters:,} parameters ({config.hidden_size} x {config.num_hidden_layers})",
            f"step            {config.batch_size} x {config.max_seq_len} tokens, {speed.dtype}: "
            f"{speed.step_seconds * 1000:.0f} ms (median)",
            f"speed           {speed.tokens_per_second:,.0f} tokens/s",
            f"arithmetic      {speed.flops_per_token / 1e6:.1f} MFLOP per token",
            f"utilisation     {speed.utilisation:.0%} of a large matrix product's "
            f"{speed.matmul_peak_flops / 1e9:,.0f} GFLOP/s",
            f"peak memory     {speed.peak_memory_mib:,.0f} MiB",
        ]
    )


@dataclass
class SamplingSpeed:
    """Sampled tokens per second, prompts included in the time: ours and transformers', best of all runs."""

    dtype: str
    rows: int
    prompts: int
    new_tokens: int
    ours: float
    transformers: float


def bench_generate(
    config: TrainConfig, vocab_size: int = 6400, rows: int = 64, length: int = 32, new_tokens: int = 80,
    repeats: int = 5,
) -> list[SamplingSpeed]:  # fmt: skip
    """Time sampling beside transformers' `generate`: same weights, precision, prompts and lengths.

    Both sample at temperature 1 from all tokens, and no row ends early. The runs take turns, and the
    best of each counts, so that what else the machine does favours neither. Once all prompts differ;
    once there are groups of 8, as in reinforcement learning.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    model = MiniMind(model_config(config, vocab_size)).to(device).eval()
    twin = transformers_twin(model).to(device, dtype)
    found = []
    for prompts in (rows, rows // 8):
        copies = rows // prompts
        ids = torch.randint(vocab_size, (prompts, length), device=device)

        def ours(ids: Tensor = ids, copies: int = copies) -> None:
            with autocast(config, device):
                sample_rollouts(model, ids.tolist(), copies, new_tokens, eos_id=-1, seed=0)

        def theirs(ids: Tensor = ids, copies: int = copies) -> None:
            twin.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                          num_return_sequences=copies, min_new_tokens=new_tokens, max_new_tokens=new_tokens)  # fmt: skip

        times = [(median_seconds(ours, 1, device, 0), median_seconds(theirs, 1, device, 0))
                 for _ in range(repeats + 1)][1:]  # fmt: skip
        speeds = [rows * new_tokens / min(side) for side in zip(*times, strict=True)]
        found.append(
            SamplingSpeed(str(dtype).removeprefix("torch."), rows, prompts, new_tokens, *speeds)
        )
    return found


def transformers_twin(model: MiniMind) -> nn.Module:
    """Return transformers' model with the same weights. UserError for a mixture of experts."""
    transformers = needed("transformers", "test")
    values = hf_config(model.config)
    if model.config.use_moe:
        raise UserError("The comparison is for dense models. Leave use_moe out.")
    config = transformers.AutoConfig.for_model(
        **{**values, "eos_token_id": None, "pad_token_id": 0}
    )
    twin = transformers.AutoModelForCausalLM.from_config(config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def sampling_text(found: list[SamplingSpeed]) -> str:
    """Return the comparison as lines to print."""
    return "\n".join(
        f"{s.rows} rows, {s.prompts} prompts, {s.new_tokens} new tokens, {s.dtype}, "
        f"{torch.get_num_threads()} threads: {s.ours:,.0f} tokens/s, transformers "
        f"{s.transformers:,.0f}: {s.ours / s.transformers:.1f} times as fast"
        for s in found
    )
