"""How fast this machine trains and samples: everything that is compared is measured in one run.

The sides of a comparison take turns, and the median of each counts, so that what else the machine
does favours neither. Reads top to bottom: measuring, one training step, chats, the card, the table;
sampling stands at the end.

Left out: several processes, and reading the data.
"""

from __future__ import annotations

import copy
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.compiling import compile_blocks
from minimind.config import TrainConfig, data_samples
from minimind.data import Batch, batch_order, pad_batch
from minimind.errors import UserError, needed
from minimind.generate import sample_rollouts
from minimind.interop import hf_config
from minimind.model import MiniMind
from minimind.precision import autocast, pick_dtype
from minimind.stages.pretrain import count_labels, language_model_loss, next_token_loss
from minimind.stages.sft import read_chats
from minimind.stages.task import Metrics, Task
from minimind.tokenizer import Tokenizer
from minimind.trainer import (
    Run,
    make_optimizers,
    make_scaler,
    model_config,
    optimizer_step,
    pick_device,
)

# Dense bfloat16 operations per second with float32 sums, from NVIDIA's data sheets (H200 to L4;
# half of what they give with sparsity) and its white papers on Ada and Ampere GA102 (RTX). The
# first name in the card's own counts; a Ti, D or laptop card is another one.
PEAKS = {"H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
         "L4": 121e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12}  # fmt: skip
CARD_SHAPES = {"26M": (512, 8), "104M": (768, 16)}  # hidden size, layers
CHAT_BATCHES, CHAT_WIDTH = 3, 512
Work = Callable[[], object]
Loss = Callable[[nn.Module, Batch], tuple[Tensor, Metrics]]


@dataclass
class Figure:
    """A line of the table: what was measured, and in which unit."""

    part: str
    name: str
    value: float
    unit: str
    note: str = ""


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


def interleaved(
    sides: dict[str, Work], repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, float]:
    """Return the median seconds of every side. Warm-up runs do not count.

    The sides take turns, there and back again, so that none always follows the same one.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + warmup):
        for name, work in list(sides.items())[:: -1 if turn % 2 else 1]:
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found[warmup:]) for name, found in times.items()}


def median_seconds(work: Work, repeats: int, device: torch.device, warmup: int = 2) -> float:
    """Return the median time of `work` over `repeats` runs, after `warmup` runs that do not count."""
    return interleaved({"work": work}, repeats, device, warmup)["work"]


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Return the operations per second of a large matrix product: what this machine can do at best."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [median_seconds(lambda: F.linear(a, b), 1, device, warmup=0) for _ in range(12)]
    return 2 * size**3 / min(times)


def peak_flops(device: torch.device, dtype: torch.dtype, card: str) -> tuple[float, str]:
    """Return the operations per second that are possible, and who says so.

    Args:
        card: the name of the GPU; "" on a CPU.
    """
    known = [p for n, p in PEAKS.items() if re.search(rf"\b{n}\b(?! (Ti|D|Laptop))", card)]
    if known and dtype == torch.bfloat16:
        return known[0], f"the data sheet's {known[0] / 1e12:.0f} TFLOP/s"
    peak = matmul_peak(device, dtype)
    return peak, f"a large matrix product's {peak / 1e9:,.0f} GFLOP/s"


def peak_memory(device: torch.device) -> float:
    """Return the peak memory so far in MiB, of the GPU or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss may be that of the process which started this one
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def random_rows(config: TrainConfig, vocab_size: int, device: torch.device) -> Batch:
    """Return `batch_size` rows of `max_seq_len` random tokens, all of them labels."""
    ids = torch.randint(vocab_size, (config.batch_size, config.max_seq_len), device=device)
    return {"input_ids": ids, "labels": ids}


def step_of(
    model: nn.Module, config: TrainConfig, batches: list[Batch], loss: Loss = language_model_loss
) -> Work:
    """Return what takes one optimizer step on each of the batches: the trainer's own step."""
    run = Run(model.train(), make_optimizers(model, config), make_scaler(config, model.device))
    task = Task([], [], [], list, loss, count_labels)

    def work() -> None:
        for batch in batches:
            optimizer_step(run, [batch], task, 1e-4, config)

    return work


def their_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
    """The loss as transformers computes it."""
    return model(batch["input_ids"], labels=batch["labels"], use_cache=False).loss, {}


def plain_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
    """The loss by way of all logits at once."""
    return next_token_loss(model(batch["input_ids"]), batch["labels"]), {}


def dtypes_here(config: TrainConfig, device: torch.device) -> list[str]:
    """Return the number formats to compare: bfloat16 only where the hardware computes in it."""
    hardware = pick_dtype("auto", device) == torch.bfloat16
    return ["float32", "bfloat16"] if hardware and config.dtype != "float32" else ["float32"]


def step_figures(config: TrainConfig, vocab_size: int, repeats: int) -> list[Figure]:
    """Compare one training step: ours, transformers', compiled, checkpointed; float32 and bfloat16."""
    device, part = pick_device(config.device), "training step"
    model = MiniMind(model_config(config, vocab_size)).to(device)
    rows = random_rows(config, vocab_size, device)
    twin = None if config.use_moe else transformers_twin(model).to(device)
    with torch.no_grad():
        losses = [
            float(loss(side, rows)[0])
            for side, loss in ((model, plain_loss), (twin, their_loss))
            if side
        ]
    sides, found, best = {}, [], dtypes_here(config, device)[-1]
    for dtype in dtypes_here(config, device):
        settings = replace(config, dtype=dtype)
        sides[f"ours, {dtype}"] = step_of(copy.deepcopy(model), settings, [rows])
        if twin:
            theirs = copy.deepcopy(twin)
            sides[f"transformers, {dtype}"] = step_of(theirs, settings, [rows], their_loss)
    if config.gradient_checkpointing:
        again = copy.deepcopy(model)
        again.model.gradient_checkpointing = True
        sides[f"checkpointed, {best}"] = step_of(again, replace(config, dtype=best), [rows])
    if config.compile:
        fast, settings = copy.deepcopy(model), replace(config, dtype=best)
        try:
            seconds = compile_blocks(fast, settings)
            sides[f"compiled, {best}"] = step_of(fast, settings, [rows])
            found.append(Figure(part, "compile time", seconds, "s", "once, in no step's time"))
        except UserError as error:
            found.append(Figure(part, "compiled", float("nan"), "", str(error)))
    tokens = rows["input_ids"].numel()
    times = interleaved(sides, repeats, device)
    found = [
        Figure(part, name, tokens / s, "tokens/s", f"{s * 1e3:,.0f} ms")
        for name, s in times.items()
    ] + found
    return found + list(step_ratios(times, best, max(losses) - min(losses)))


def step_ratios(times: dict[str, float], best: str, gap: float) -> Iterator[Figure]:
    """Yield how many times as fast one side is as another, of those that were measured."""
    pairs = [(f"ours, {dtype}", f"transformers, {dtype}") for dtype in ("float32", "bfloat16")]
    pairs += [("ours, bfloat16", "ours, float32")]
    pairs += [(f"{kind}, {best}", f"ours, {best}") for kind in ("compiled", "checkpointed")]
    for one, other in pairs:
        if one in times and other in times:
            note = f"losses differ by {gap:.0e}" if other == "transformers, float32" else ""
            yield Figure(
                "training step", f"{one} / {other}", times[other] / times[one], "times", note
            )


def peak_of_step(config: TrainConfig, vocab_size: int) -> float:
    """Return the peak memory of two training steps in MiB. For a process of its own."""
    device = pick_device(config.device)
    model = MiniMind(model_config(config, vocab_size)).to(device)
    model.model.gradient_checkpointing = bool(config.gradient_checkpointing)
    work = step_of(model, config, [random_rows(config, vocab_size, device)])
    work()
    work()
    return peak_memory(device)


def memory_figures(config: TrainConfig, vocab_size: int) -> list[Figure]:
    """Compare the peak memory of a step with and without gradient checkpointing, in new processes."""
    device, found = pick_device(config.device), []
    dtype = dtypes_here(config, device)[-1]
    for again in (0, 1) if config.gradient_checkpointing else (0,):
        settings = replace(config, dtype=dtype, gradient_checkpointing=again)
        with get_context("spawn").Pool(1) as process:
            mib = process.apply(peak_of_step, (settings, vocab_size))
        found.append(Figure("peak memory", "checkpointed" if again else "ours", mib, "MiB", dtype))
    return found


def chat_figures(config: TrainConfig, vocab_size: int, repeats: int) -> list[Figure]:
    """Compare useful tokens per second on the course's chats: our batches, and padded to 512.

    Useful is what is no padding. Rows are the same on both sides, and so is the model.
    """
    device, part = pick_device(config.device), "chats"
    tokenizer = Tokenizer.load(data_samples("tokenizer.json"))
    chats = read_chats(data_samples("sft.jsonl"), tokenizer, CHAT_WIDTH)
    lengths = [len(chat["input_ids"]) for chat in chats]
    order = batch_order(lengths, 4 * config.batch_size, seed=0)[:CHAT_BATCHES]
    groups = [[chats[i] for i in rows] for rows in order]
    fill = {"input_ids": [tokenizer.pad_id] * CHAT_WIDTH, "labels": [-100] * CHAT_WIDTH}
    wide = [[{k: row[k] + fill[k][len(row[k]) :] for k in row} for row in rows] for rows in groups]
    settings = replace(config, dtype=dtypes_here(config, device)[-1])
    model = MiniMind(model_config(config, max(vocab_size, tokenizer.vocab_size))).to(device)
    batched = {"ours": (groups, language_model_loss), "padded": (wide, plain_loss)}
    sides = {
        name: step_of(copy.deepcopy(model), settings, [pad_batch(g, tokenizer.pad_id) for g in rows], loss)
        for name, (rows, loss) in batched.items()
    }  # fmt: skip
    times = interleaved(sides, repeats, device)
    useful = sum(len(row["input_ids"]) for rows in groups for row in rows)
    mean = f"{useful / sum(map(len, groups)):.0f} tokens a row, {settings.dtype}"
    return [
        Figure(part, "rows of like length", useful / times["ours"], "useful tokens/s", mean),
        Figure(part, f"padded to {CHAT_WIDTH}", useful / times["padded"], "useful tokens/s"),
        Figure(part, "ours / padded", times["padded"] / times["ours"], "times"),
    ]


def utilisation_figure(
    name: str, model: MiniMind, length: int, tokens_per_second: float, peak: tuple[float, str]
) -> Figure:
    """Return which share of the possible arithmetic was training: `peak` is `peak_flops`'s."""
    flops = flops_per_token(model, length)
    share = 100 * flops * tokens_per_second / peak[0]
    note = f"of {peak[1]}; {flops / 1e6:.1f} MFLOP per token, {model.num_parameters:,} parameters"
    return Figure("utilisation", name, share, "%", note)


def card_figures(
    config: TrainConfig, vocab_size: int, repeats: int, card: str, shapes: dict[str, tuple[int, int]] = CARD_SHAPES
) -> list[Figure]:  # fmt: skip
    """Measure speed and memory of the guide's two models, compiled if `compile` says so, beside the card's peak."""
    device, found = pick_device(config.device), []
    dtype = dtypes_here(config, device)[-1]
    peak = peak_flops(device, getattr(torch, dtype), card)
    for name, (hidden, layers) in shapes.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        settings = replace(config, hidden_size=hidden, num_hidden_layers=layers, dtype=dtype)
        model = MiniMind(model_config(settings, vocab_size)).to(device)
        if settings.compile:
            compile_blocks(model, settings)
        rows = random_rows(settings, vocab_size, device)
        seconds = interleaved({name: step_of(model, settings, [rows])}, repeats, device)[name]
        speed = rows["input_ids"].numel() / seconds
        kind = "compiled" if settings.compile else "not compiled"
        found.append(Figure("card", name, speed, "tokens/s", f"{card}, {dtype}, {kind}"))
        found.append(Figure("card", f"{name}, peak memory", peak_memory(device), "MiB"))
        found.append(utilisation_figure(name, model, settings.max_seq_len, speed, peak))
    return found


def time_figures(tokens_per_second: float, side: str) -> Iterator[Figure]:
    """Yield how long one pass over 1, 10 and 100 million tokens takes at a measured speed."""
    for millions in (1, 10, 100):
        minutes = millions * 1e6 / tokens_per_second / 60
        yield Figure(
            "time", f"{millions}M tokens", minutes, "minutes", f"{minutes / 60:.1f} h, {side}"
        )


def bench(config: TrainConfig, vocab_size: int = 6400, repeats: int = 5) -> list[Figure]:
    """Measure everything, for a model of this config on this machine; `bench_text` prints it.

    Steps are of `batch_size` rows of `max_seq_len` tokens. `compile=0` and
    `gradient_checkpointing=0` leave those two sides out, `dtype="float32"` all of bfloat16.
    """
    device = pick_device(config.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    dtype = dtypes_here(config, device)[-1]
    found = step_figures(config, vocab_size, repeats)
    found += memory_figures(config, vocab_size)
    found += chat_figures(config, vocab_size, max(1, repeats // 2))
    speeds = {f.name: f.value for f in found if f.part == "training step" and f.unit == "tokens/s"}
    if card:
        found += card_figures(config, vocab_size, repeats, card)
    else:
        model = MiniMind(model_config(config, vocab_size))
        peak = peak_flops(device, getattr(torch, dtype), card)
        speed = speeds[f"ours, {dtype}"]
        found.append(utilisation_figure(f"ours, {dtype}", model, config.max_seq_len, speed, peak))
    side = max(speeds, key=lambda name: 0 if "transformers" in name else speeds[name])
    return found + list(time_figures(speeds[side], side))


def machine_text(config: TrainConfig) -> str:
    """Return on what it was measured, and whether there is bfloat16."""
    device = pick_device(config.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    bf16 = pick_dtype("auto", device) == torch.bfloat16
    return (
        f"{card}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{'with' if bf16 else 'without'} bfloat16 in hardware; {config.hidden_size} x "
        f"{config.num_hidden_layers}, steps of {config.batch_size} x {config.max_seq_len} tokens"
    )


def bench_text(found: list[Figure]) -> str:
    """Return the figures as a table to print, one block for every part."""
    lines, part = [], ""
    for figure in found:
        if figure.part != part:
            part = figure.part
            lines += ["", part]
        value = f"{figure.value:,.0f}" if figure.value >= 100 else f"{figure.value:.2f}"
        lines.append(f"  {figure.name:46}{value:>10} {figure.unit:16}{figure.note}".rstrip())
    return "\n".join(lines[1:])


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
