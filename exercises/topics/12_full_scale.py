"""Exercises 12: memory, hours, shares of a gradient over processes, resume points, a plan."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from checks import Exercise

TITLE = "Full scale"
PRACTISES = (
    "the memory of a training step, hours on a card, whose gradient weighs how much among many "
    "processes, what a resume point must hold, fitting a run to the machines you have."
)


# Memory


def training_memory(parameters: int, hidden: int, wide: int, layers: int, vocab: int, rows: int,
                    length: int) -> int:  # fmt: skip
    """Return the bytes that a float32 training step with AdamW needs at its peak.

    12 bytes a parameter for the weight and two moments, and the larger of two things that are
    never there together: the gradients (4 bytes a parameter), or what the backward pass needs:
    for each token 11·hidden + 4·wide numbers in every layer, and three copies of the logits, of
    which at most 2**23 are there at once: the rest come in later chunks.

    Args:
        hidden, wide: size of the residual stream and of the feed-forward.
        rows, length: the batch, of `rows` rows with `length` tokens each.
    """
    ### BEGIN SOLUTION
    tokens = rows * length
    activations = 4 * tokens * layers * (11 * hidden + 4 * wide)
    kept = activations + 12 * min(tokens * vocab, 2**23)
    return 12 * parameters + max(4 * parameters, kept)
    ### END SOLUTION


def memory_cases(seed: int) -> list[tuple]:
    draw = random.Random(seed)
    drawn = (
        draw.randint(10**6, 10**8),
        64 * draw.randint(2, 16),
        64 * draw.randint(5, 40),
        draw.randint(2, 20),
    )
    return [
        (25_829_888, 512, 1408, 8, 6400, 32, 340),
        (25_829_888, 512, 1408, 8, 6400, 1, 16),  # gradients are more than activations
        (104_030_976, 768, 2048, 16, 6400, 4, 1024),
        (*drawn, 6400, draw.randint(2, 50), draw.randint(100, 500)),
    ]


def kept_for_backward(hidden, wide, layers, vocab, rows, length):
    tokens = rows * length
    return 4 * tokens * layers * (11 * hidden + 4 * wide) + 12 * min(tokens * vocab, 2**23)


def everything_at_once(parameters, hidden, wide, layers, vocab, rows, length):
    """You add gradients and activations; the ones appear while the others go, layer by layer."""
    return 16 * parameters + kept_for_backward(hidden, wide, layers, vocab, rows, length)


def without_moments(parameters, hidden, wide, layers, vocab, rows, length):
    """You forget the optimizer: AdamW keeps two numbers for every parameter."""
    kept = kept_for_backward(hidden, wide, layers, vocab, rows, length)
    return 4 * parameters + max(4 * parameters, kept)


def one_moment(parameters, hidden, wide, layers, vocab, rows, length):
    """You count one moment; AdamW keeps a mean of the gradients and a mean of their squares."""
    kept = kept_for_backward(hidden, wide, layers, vocab, rows, length)
    return 8 * parameters + max(4 * parameters, kept)


def logits_forgotten(parameters, hidden, wide, layers, vocab, rows, length):
    """You leave the logits out, although a vocabulary is wider than any layer."""
    kept = kept_for_backward(hidden, wide, layers, 0, rows, length)
    return 12 * parameters + max(4 * parameters, kept)


def logits_in_every_layer(parameters, hidden, wide, layers, vocab, rows, length):
    """You count the logits in every layer; they are made once, after the last one."""
    per_layer = kept_for_backward(hidden, wide, 1, vocab, rows, length)
    return 12 * parameters + max(4 * parameters, layers * per_layer)


def all_logits_at_once(parameters, hidden, wide, layers, vocab, rows, length):
    """You keep the logits of the whole batch; they come in chunks, and a chunk is made again."""
    kept = kept_for_backward(hidden, wide, layers, 0, rows, length)
    return 12 * parameters + max(4 * parameters, kept + 12 * rows * length * vocab)


def one_layer(parameters, hidden, wide, layers, vocab, rows, length):
    """You count the activations of one layer; all layers' wait for the backward pass."""
    kept = kept_for_backward(hidden, wide, 1, vocab, rows, length)
    return 12 * parameters + max(4 * parameters, kept)


def numbers_for_bytes(parameters, hidden, wide, layers, vocab, rows, length):
    """You count numbers of the activations, not bytes: a float32 has four."""
    kept = kept_for_backward(hidden, wide, layers, vocab, rows, length) // 4
    return 12 * parameters + max(4 * parameters, kept)


def one_row(parameters, hidden, wide, layers, vocab, rows, length):
    """You count one row; the whole batch is in memory at once."""
    kept = kept_for_backward(hidden, wide, layers, vocab, 1, length)
    return 12 * parameters + max(4 * parameters, kept)


TRAINING_MEMORY = Exercise(
    solution=training_memory,
    cases=memory_cases,
    title="Will it fit?",
    difficulty=2,
    importance=5,
    minutes=10,
    statement=r"""
Before you rent a machine, you want to know what a step needs:

$$12N + \max\big(4N,\ 4\,B\,T\,L\,(11C + 4I) + 12 \min(B\,T\,V,\ 2^{23})\big) \text{ bytes}$$

with $N$ parameters, $B$ rows of $T$ tokens, $L$ layers of hidden size $C$ and feed-forward width
$I$ (`wide`), and $V$ tokens in the vocabulary. Of the logits at most $2^{23}$ are there at once.

**Before you write:** for a 26M model with 32 rows of 340 tokens, which side of the max is larger?
And with one row of 16 tokens?
""",
    hints=[
        "Three parts: what each parameter needs for itself, what each token needs in each layer, what "
        "the logits need, chunk by chunk.",
        "Compute the bytes kept for the backward pass first, then take the max with the gradients.",
    ],
    mistakes=[everything_at_once, without_moments, one_moment, logits_forgotten,
              logits_in_every_layer, all_logits_at_once, one_layer, numbers_for_bytes, one_row],
    discussion="Only the right side of the max shrinks with the batch. When even one row does not fit, "
    "the ways out are gradient checkpointing (keep less, compute it again) and FSDP (spread 16N over cards).",
)  # fmt: skip


# Hours


def hours_on_cards(parameters: int, layers: int, hidden: int, length: int, tokens: float, peak: float,
                   utilisation: float, cards: int) -> float:  # fmt: skip
    """Return the hours that training on `tokens` tokens takes.

    Each token costs 6 operations per parameter, and 6·layers·hidden·length for causal attention.

    Args:
        peak: operations per second that one card can do at best.
        utilisation: the share of it that a run gets, from 0 to 1.
    """
    ### BEGIN SOLUTION
    operations = tokens * (6 * parameters + 6 * layers * hidden * length)
    return operations / (cards * peak * utilisation) / 3600
    ### END SOLUTION


def hours_cases(seed: int) -> list[tuple]:
    draw = random.Random(seed)
    return [
        (25_829_888, 8, 512, 340, 479.4e6, 71e12, 0.3, 1),
        (104_030_976, 16, 768, 340, 479.4e6, 71e12, 0.3, 8),
        (draw.randint(10**7, 10**9), 12, 640, 2048, 1e10 * draw.random() + 1e9, 312e12, 0.42, 4),
    ]


def operations_of(parameters, layers, hidden, length, tokens):
    return tokens * (6 * parameters + 6 * layers * hidden * length)


def forward_only(parameters, layers, hidden, length, tokens, peak, utilisation, cards):
    """You count the forward pass alone; going back costs twice as much again."""
    return (
        operations_of(parameters, layers, hidden, length, tokens)
        / 3
        / (cards * peak * utilisation)
        / 3600
    )


def forward_and_one_backward(parameters, layers, hidden, length, tokens, peak, utilisation, cards):
    """You count 4 operations per parameter: backward needs the gradient of the weight *and* of the
    input."""
    operations = tokens * (4 * parameters + 6 * layers * hidden * length)
    return operations / (cards * peak * utilisation) / 3600


def attention_forgotten(parameters, layers, hidden, length, tokens, peak, utilisation, cards):
    """You leave attention out; its products have no parameters, but they take time, more with length."""
    return tokens * 6 * parameters / (cards * peak * utilisation) / 3600


def at_the_peak(parameters, layers, hidden, length, tokens, peak, utilisation, cards):
    """You use the whole peak, as advertisements do; a run gets a share of it."""
    return operations_of(parameters, layers, hidden, length, tokens) / (cards * peak) / 3600


def utilisation_times(parameters, layers, hidden, length, tokens, peak, utilisation, cards):
    """You multiply by the utilisation: with you a badly used card is the faster one."""
    return (
        operations_of(parameters, layers, hidden, length, tokens)
        * utilisation
        / (cards * peak)
        / 3600
    )


def cards_forgotten(parameters, layers, hidden, length, tokens, peak, utilisation, cards):
    """You let one card do all the work; each takes its part."""
    return operations_of(parameters, layers, hidden, length, tokens) / (peak * utilisation) / 3600


def cards_times(parameters, layers, hidden, length, tokens, peak, utilisation, cards):
    """More cards make your run slower: each takes a part of the work, not all of it."""
    return (
        operations_of(parameters, layers, hidden, length, tokens)
        * cards
        / (peak * utilisation)
        / 3600
    )


def in_seconds(parameters, layers, hidden, length, tokens, peak, utilisation, cards):
    """You return seconds; asked for were hours."""
    return operations_of(parameters, layers, hidden, length, tokens) / (cards * peak * utilisation)


HOURS_ON_CARDS = Exercise(
    solution=hours_on_cards,
    cases=hours_cases,
    title="How long?",
    difficulty=1,
    importance=4,
    minutes=10,
    statement=r"""
$$\text{hours} = \frac{\text{tokens} \cdot (6N + 6LCT)}{\text{cards} \cdot \text{peak} \cdot \text{utilisation} \cdot 3600}$$

Guess first: 26 million parameters, 479 million tokens, one card with a peak of 71 TFLOP/s of which
30% are reached. Minutes, hours or days?
""",
    hints=[
        "Count the operations of one token, then of all, then divide by what the machine does per second.",
        "Where does each of cards, peak and utilisation stand: above the line or below?",
    ],
    mistakes=[forward_only, forward_and_one_backward, attention_forgotten, at_the_peak,
              utilisation_times, cards_forgotten, cards_times, in_seconds],
    discussion="Turned round, the formula gives the utilisation that a reported time implies. Far above 60% "
    "or below 1%, something about the report is wrong.",
)  # fmt: skip


# Shares


def loss_factors(counts: list[list[int]]) -> list[list[float]]:
    """Return the factor for the mean loss of every micro-batch of every process.

    Each process adds up the gradients of its micro-batches. Then an exchange gives every process
    the MEAN of these sums over the processes, as PyTorch's DistributedDataParallel does. With your
    factors this must be the gradient of the mean over all labelled tokens.

    Args:
        counts: counts[r][m] is the number of labelled tokens in micro-batch m of process r. Some may
            be 0, not all.
    """
    ### BEGIN SOLUTION
    total = sum(sum(own) for own in counts)
    return [[len(counts) * count / total for count in own] for own in counts]
    ### END SOLUTION


def factor_cases(seed: int) -> list[tuple]:
    draw = random.Random(seed)
    return [
        ([[10, 30]],),  # one process: plain accumulation
        ([[10], [30]],),
        ([[5, 0, 7], [40, 20, 1], [0, 0, 0], [9, 9, 100]],),
        ([[draw.randint(1, 50) for _ in range(2)] for _ in range(3)],),
    ]


def mean_of_all_means(counts):
    """You give all micro-batches the same say, so a token in a short one counts more than others."""
    return [[1 / len(own) for _ in own] for own in counts]


def exchange_takes_no_mean(counts):
    """Your shares add up to 1, but the exchange divides by the number of processes once more."""
    total = sum(sum(own) for own in counts)
    return [[count / total for count in own] for own in counts]


def within_the_process(counts):
    """You weigh micro-batches within each process; a process with few labels then has as much say
    as one with many."""
    return [[count / max(sum(own), 1) for count in own] for own in counts]


def weighed_by_process(counts):
    """You weigh processes by their labels, but their micro-batches all alike."""
    total = sum(sum(own) for own in counts)
    return [[len(counts) * sum(own) / total / len(own) for _ in own] for own in counts]


def divided_by_processes(counts):
    """You divide by the number of processes; the exchange does that already, so undo it."""
    total = sum(sum(own) for own in counts)
    return [[count / total / len(counts) for count in own] for own in counts]


def by_the_mean_count(counts):
    """You compare with the mean count of a micro-batch, so more micro-batches make a larger step."""
    flat = [count for own in counts for count in own]
    return [[count * len(flat) / sum(flat) for count in own] for own in counts]


def never_divided(counts):
    """You never divide by the number of labels: the step grows with the batch."""
    return [[float(count) for count in own] for own in counts]


LOSS_FACTORS = Exercise(
    solution=loss_factors,
    cases=factor_cases,
    title="Whose gradient weighs how much?",
    difficulty=3,
    importance=5,
    minutes=20,
    statement="""
Four processes train one model, each on three micro-batches, and answers have all lengths. The result
must be what one process with one huge batch would get. `loss.backward()` works on the **mean** loss of
a micro-batch, and the exchange takes a **mean** over processes. Both are the wrong mean; your factors
mend them.

Try `[[10], [30]]` on paper: two processes, 10 and 30 labels. Which two numbers?
""",
    hints=[
        "Write down the gradient you want: a sum over tokens, divided by one number. Which?",
        "A mean loss times its own count is a sum. What remains to divide by?",
        "The exchange divides by the number of processes, which nobody asked for. Multiply by it.",
    ],
    mistakes=[mean_of_all_means, exchange_takes_no_mean, within_the_process, weighed_by_process,
              divided_by_processes, by_the_mean_count, never_divided],
    discussion="`minimind` sums instead of averaging, so there the factor is count / total. The total needs "
    "an exchange of its own, of one number, *before* the backward passes.",
)  # fmt: skip


# Resume points


def save_point(run: dict) -> dict:
    """Return a resume point: all that the next steps of this run depend on.

    Args:
        run: "weight" and "momentum", tensors that each step changes in place; "step", an int, from
            which learning rate and place in the data follow; "generator", a torch.Generator, which
            draws dropout; "rate" and "steps", settings that never change.

    Returns:
        A dict with "weight", "momentum", "step" and "random": the generator's `get_state()`.
        The run goes on after this call; what you return must not change with it.
    """
    ### BEGIN SOLUTION
    return {
        "weight": run["weight"].clone(),
        "momentum": run["momentum"].clone(),
        "step": run["step"],
        "random": run["generator"].get_state(),
    }
    ### END SOLUTION


def save_cases(seed: int) -> list[tuple]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(4, 3, generator=g), torch.randn(20, 4, generator=g), cut) for cut in (3, 7)
    ]


def new_run(weight: torch.Tensor) -> dict:
    return {"weight": weight.clone(), "momentum": torch.zeros_like(weight), "step": 0,
            "generator": torch.Generator().manual_seed(5), "rate": 0.1, "steps": 12}  # fmt: skip


def take_step(run: dict, data: torch.Tensor) -> float:
    """One step of gradient descent with momentum, a schedule, shuffled data and dropout."""
    weight = run["weight"].clone().requires_grad_()
    row = data[(7 * run["step"]) % len(data)]
    mask = torch.rand(4, generator=run["generator"]) > 0.3
    loss = ((row * mask) @ weight - row.sum()).square().mean()
    loss.backward()
    rate = run["rate"] * (0.1 + 0.45 * (1 + math.cos(math.pi * run["step"] / run["steps"])))
    run["momentum"].mul_(0.9).add_(weight.grad)
    run["weight"].sub_(0.1 * rate * run["momentum"])
    run["step"] += 1
    return loss.item()


def run_save(function, weight: torch.Tensor, data: torch.Tensor, cut: int) -> dict:
    """Save after `cut` steps, let the run go on, then start a new one from the point."""
    run = new_run(weight)
    for _ in range(cut):
        take_step(run, data)
    point = function(run)
    if not isinstance(point, dict):
        return point
    for _ in range(2):  # the crash comes two steps later
        take_step(run, data)
    resumed = new_run(weight)
    for name in ("weight", "momentum"):
        if name in point:
            resumed[name] = point[name].to(torch.float32).clone()
    resumed["step"] = point.get("step", 0)
    if "random" in point:
        resumed["generator"].set_state(point["random"])
    return {"losses after the resume": [take_step(resumed, data) for _ in range(4)]}


def momentum_lost(run):
    """The optimizer's memory is missing: the first steps after the resume go another way."""
    return {name: value for name, value in save_point(run).items() if name != "momentum"}


def step_lost(run):
    """The step is missing: learning rate and data start again at the beginning, and the loss jumps."""
    return {name: value for name, value in save_point(run).items() if name != "step"}


def random_lost(run):
    """The random state is missing: after the resume dropout falls elsewhere."""
    return {name: value for name, value in save_point(run).items() if name != "random"}


def only_the_weight(run):
    """You save what the finished model needs; a run that goes on needs more."""
    return {"weight": run["weight"].clone()}


def in_half_precision(run):
    """You save the weight in 16 bits: two thirds of its digits are gone after the resume."""
    return {**save_point(run), "weight": run["weight"].to(torch.bfloat16)}


def not_copied(run):
    """You keep the run's own tensors; the run goes on and changes your resume point under your hands."""
    return {**save_point(run), "weight": run["weight"], "momentum": run["momentum"]}


def next_step(run):
    """You save the number of the next step as if it were done: one batch is never seen."""
    return {**save_point(run), "step": run["step"] + 1}


def step_before(run):
    """You save the number of the step before: one batch is seen twice."""
    return {**save_point(run), "step": run["step"] - 1}


SAVE_POINT = Exercise(
    solution=save_point,
    cases=save_cases,
    run=run_save,
    title="What must a resume point hold?",
    difficulty=3,
    importance=5,
    minutes=15,
    statement="""
"After I resumed, the loss jumped." Then something that the next step depends on was not in the file. The
check takes some steps, calls your `save_point`, lets the run go on for two more steps, kills it, and starts
a new one from your point. Its losses must be those of a run that was never killed, bit for bit.

Go through one step in your head: weights, the optimizer, the learning rate, which rows come next, dropout.
What does each of them read?
""",
    hints=[
        "Four entries. Settings that never change are given again at the start.",
        "`run[\"weight\"]` is changed in place later. What does your dict hold then?",
        "Copy tensors with `.clone()`; `run[\"generator\"].get_state()` is a copy already.",
    ],
    mistakes=[momentum_lost, step_lost, random_lost, only_the_weight, in_half_precision, not_copied,
              next_step, step_before],
    discussion="`minimind`'s resume point has the same parts, and the log. Because the order of the data "
    "follows from seed and step, the state of the data is one number.",
)  # fmt: skip


# A plan


def plan_run(
    memory: Callable[[int], float], limit: float, cards: int, rows: int
) -> tuple[int, int]:
    """Return (batch_size, accumulation_steps) for a run on several cards.

    Every step must see exactly `rows` rows: batch_size · accumulation_steps · cards.

    Args:
        memory: batch_size to the bytes that one card needs; it grows with the batch.
        limit: bytes that one card has.
        rows: rows of one step, all cards together; a multiple of `cards`.
    """
    ### BEGIN SOLUTION
    own = rows // cards  # rows of one card in one step
    fitting = [size for size in range(1, own + 1) if own % size == 0 and memory(size) <= limit]
    return max(fitting), own // max(fitting)
    ### END SOLUTION


class Memory:
    """Bytes of one card as a function of its batch size, for the 26M model's shape by default."""

    def __init__(self, parameters=25_829_888, hidden=512, wide=1408, layers=8, length=340):
        self.shape = parameters, hidden, wide, layers, 6400
        self.length = length

    def __call__(self, batch_size):
        return training_memory(*self.shape, batch_size, self.length)

    def __eq__(self, other):
        return isinstance(other, Memory) and self.shape == other.shape


def plan_cases(seed: int) -> list[tuple]:
    large = Memory(104_030_976, 768, 2048, 16, 1024)
    return [
        (Memory(), 8e9, 1, 256),
        (Memory(), 8e9, 4, 256),
        (Memory(), 24e9, 2, 384),
        (large, 24e9, 4, 96),
        (Memory(), 80e9, 8, 64 * (seed + 1)),
    ]


def plan_judge(cases, results):
    for (memory, limit, cards, rows), plan in zip(cases, results):
        size, k = plan
        where = f"{rows} rows on {cards} cards of {limit / 1e9:.0f} GB, your plan is {size} × {k}: "
        if isinstance(size, float) or isinstance(k, float) or min(size, k) < 1:
            return where + "both must be whole numbers of at least 1."
        if size * k * cards != rows:
            return where + f"a step sees {size * k * cards} rows."
        if memory(size) > limit:
            return where + f"a card would need {memory(size) / 1e9:.1f} GB."
        best = plan_run(memory, limit, cards, rows)[0]
        if 2 * size <= best:
            return where + f"it fits, but {best} rows fit at once; small batches leave a card idle."
    return None


def cards_ignored(memory, limit, cards, rows):
    """You plan for one card; with all of them a step sees too many rows, and the learning rate no
    longer fits."""
    fitting = [size for size in range(1, rows + 1) if rows % size == 0 and memory(size) <= limit]
    return max(fitting), rows // max(fitting)


def memory_ignored(memory, limit, cards, rows):
    """You put all rows of a card into one batch without asking whether they fit."""
    return rows // cards, 1


def one_row_at_a_time(memory, limit, cards, rows):
    """It fits and it is right, but one row at a time leaves the card idle most of the time."""
    return 1, rows // cards


def rounded_up(memory, limit, cards, rows):
    """You take the largest batch that fits and round the accumulation up: a step sees more rows than
    were asked for."""
    own = rows // cards
    size = max(s for s in range(1, own + 1) if memory(s) <= limit)
    return size, -(-own // size)


def rounded_down(memory, limit, cards, rows):
    """You take the largest batch that fits and round the accumulation down: a step sees fewer rows
    than were asked for."""
    own = rows // cards
    size = max(s for s in range(1, own + 1) if memory(s) <= limit)
    return size, own // size


def all_cards_one_memory(memory, limit, cards, rows):
    """You add up the memory of the cards; each holds the whole model and its own batch."""
    own = rows // cards
    fitting = [s for s in range(1, own + 1) if own % s == 0 and memory(s) <= limit * cards]
    return max(fitting), own // max(fitting)


PLAN_RUN = Exercise(
    solution=plan_run,
    cases=plan_cases,
    judge=plan_judge,
    title="A plan for your machines (open-ended)",
    difficulty=3,
    importance=4,
    minutes=20,
    statement="""
You found the learning rate with 256 rows a step. Now you get other machines: one card with 8 GB, four of
them, two with 24 GB. The number of rows in a step must stay, or the learning rate no longer fits. Choose
`batch_size` (rows of one card in one forward pass) and `accumulation_steps`.

There is more than one good answer. The check wants: exactly `rows` rows, no card overfull, and no batch
less than half as large as the largest that would do.
""",
    hints=[
        "How many rows does one card take in one step? That number, you cut into equal batches.",
        "Try all batch sizes that divide it; keep those that fit.",
    ],
    mistakes=[cards_ignored, memory_ignored, one_row_at_a_time, rounded_up, rounded_down,
              all_cards_one_memory],
    discussion="Leave some room below the limit: longest rows, held-out batches and other programs need "
    "memory too. Then try the plan for ten steps before you start it for ten hours.",
)  # fmt: skip


EXERCISES = [HOURS_ON_CARDS, TRAINING_MEMORY, LOSS_FACTORS, SAVE_POINT, PLAN_RUN]
