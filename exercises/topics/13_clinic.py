"""Exercises 13: three patients without a label, and an alarm that watches runs."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
import ward
from checks import Exercise
from torch import Tensor

from minimind.trainer import learning_rate

TITLE = "The clinic"
PRACTISES = (
    "finding the cause of a sick run among several that look alike, mending it, and teaching a program "
    "to notice."
)


def statement(look: str, story: str, check: str) -> str:
    """Return what a patient's exercise says: how to look at it, its story, and what is checked."""
    return f"""
```python
{look}
```

{story}

Run the patient, look at its log, and probe it. For each suspect ask what one would *then* see, and look whether
one does. Read the code, in `exercises/ward.py`, only when you have an opinion.

Return the cause and the mend. {check}
"""


EACH_ROW = "for row in ward.{}():\n    print(row)"


def diagnosed(cause: str, right: str, suspects: tuple[str, ...]) -> bool:
    """Whether the cause is the right one. ValueError if it is none of the suspects."""
    if cause not in suspects:
        listed = "; ".join(suspects)
        raise ValueError(
            f"expected one of the suspects ({listed}) as the cause, yours is {cause!r}"
        )
    return cause == right


# 1. A loss that is too good


def too_good(length: int) -> tuple[str, Tensor]:
    """Return the cause of the first patient's illness, and the mask that heals it.

    Returns:
        one of `ward.FIRST_SUSPECTS`, word for word; and a (length, length) bool tensor, True where
        position t (row) may look at position s (column).
    """
    ### BEGIN SOLUTION
    return "the model sees the future", torch.ones(length, length).tril().bool()
    ### END SOLUTION


@cache
def reads_honestly(mask: tuple[tuple[bool, ...], ...]) -> bool:
    """Whether a reader trained with this mask learns the rule and does no better than one can."""
    allowed = torch.tensor(mask)
    if allowed.shape != (ward.LENGTH, ward.LENGTH) or allowed.dtype != torch.bool:
        return False
    _, rows = ward.first_patient(allowed)
    return 0.9 * ward.FLOOR < rows[-1]["heldout"] < 1.3 * ward.FLOOR


def run_too_good(function, length):
    cause, allowed = function(length)
    if not diagnosed(cause, "the model sees the future", ward.FIRST_SUSPECTS):
        return {"cause": cause}
    result = {"cause": cause, "mask": allowed}
    if length == ward.LENGTH:
        result["healed"] = reads_honestly(tuple(map(tuple, allowed.tolist())))
    return result


def causal(length):
    return torch.ones(length, length).tril().bool()


def learnt_by_heart(length):
    """There is nothing to know by heart: every step draws new sentences. How else can a model know the
    next id?"""
    return "the held-out rows are in the training data", causal(length)


def unshifted(length):
    """Unshifted labels would be the inputs themselves. Print both: they are not. Where else does a
    position see its label?"""
    return "the labels are not shifted", causal(length)


def clever(length):
    """Whoever knows the rule reaches the floor and not less: one id in four is drawn at random, and
    nobody can know it beforehand."""
    return "the model has learnt the rule", causal(length)


def still_transposed(length):
    """The right cause, but your mask still shows each position what comes after it. Which is the row,
    and which the column?"""
    return "the model sees the future", torch.ones(length, length).triu().bool()


def open_to_all(length):
    """The right cause, but with your mask every position looks everywhere, also ahead."""
    return "the model sees the future", torch.ones(length, length).bool()


def blind_to_itself(length):
    """The right cause, but a position may look at itself: it knows its own id and guesses the next. In
    yours the first one has nothing to look at."""
    return "the model sees the future", torch.ones(length, length).tril(-1).bool()


TOO_GOOD = Exercise(
    solution=too_good,
    cases=lambda seed: [(ward.LENGTH,), (ward.LENGTH - 3 + seed % 2,)],
    run=run_too_good,
    title="Patient 1: too good to be true",
    difficulty=2,
    importance=5,
    minutes=20,
    statement=statement(
        'reader, rows = ward.first_patient()\nprint(rows[-1], "no model can be below", ward.FLOOR)',
        f"""A small language model reads sentences of {ward.LENGTH} ids. Three times out of four the next id follows a rule, the fourth time
it is drawn at random, so the best loss that is possible is {ward.FLOOR:.2f} nats. The patient is far below, on new sentences
too. Its owner is proud.""",
        "The check trains the patient anew with your mask.",
    ),
    hints=[
        "A loss below what is possible means that the answer is somewhere in the input.",
        "Put one sentence through `reader`, change its last id, and look which rows of the logits change.",
        "The cause is the future. Position t may look at 0 … t: `tril`, or a comparison of two `arange`s.",
    ],
    mistakes=[learnt_by_heart, unshifted, clever, still_transposed, open_to_all, blind_to_itself],
    discussion="A loss that is too good is the worst symptom of all, because nobody complains. Know the floor, "
    "or at least what a good loss would be, before you train.",
)


# 2. A run that stops early


def early_plateau(batches: int, accumulation: int, peak: float) -> tuple[str, list[float]]:
    """Return the cause of the second patient's illness, and the learning rate of each of its steps.

    Args:
        batches: how many batches there are.
        accumulation: how many of them make one step; the last step may have fewer.
        peak: the highest learning rate.

    Returns:
        one of `ward.SECOND_SUSPECTS`, word for word; and one rate per step, as the run should have had.
        `learning_rate(step, total_steps, peak)` is the course's schedule.
    """
    ### BEGIN SOLUTION
    steps = math.ceil(batches / accumulation)
    return "the schedule counts batches", [learning_rate(s, steps, peak) for s in range(steps)]
    ### END SOLUTION


def run_early_plateau(function, batches, accumulation, peak):
    cause, rates = function(batches, accumulation, peak)
    if not diagnosed(cause, "the schedule counts batches", ward.SECOND_SUSPECTS):
        return {"cause": cause}
    result = {"cause": cause, "rates": rates}
    if (batches, accumulation, peak) == (ward.BATCHES, ward.ACCUMULATION, ward.PEAK):
        steps = math.ceil(batches / accumulation)
        log = ward.second_patient(rates) if len(rates) == steps else ward.second_patient()
        result["healed"] = sum(row["loss"] for row in log[-5:]) / 5 < 0.05
    return result


def right_rates(batches, accumulation, peak):
    steps = math.ceil(batches / accumulation)
    return [learning_rate(step, steps, peak) for step in range(steps)]


def never_cleared(batches, accumulation, peak):
    """A gradient that is never cleared piles up, so its norm grows. In this log it falls."""
    return "the gradient is not cleared", right_rates(batches, accumulation, peak)


def too_small(batches, accumulation, peak):
    """The first steps are as large as one could wish. Something changes after them; find out what, and
    when."""
    return "the learning rate is too small from the start", right_rates(batches, accumulation, peak)


def used_up(batches, accumulation, peak):
    """Every batch is drawn anew, so the last ones teach as much as the first. What happens to what they
    teach?"""
    return "the data are used up", right_rates(batches, accumulation, peak)


def as_it_was(batches, accumulation, peak):
    """The right cause, but these are the rates that the patient had: they are at their lowest after a
    quarter of the run."""
    steps = math.ceil(batches / accumulation)
    ends = [min(batches, (s + 1) * accumulation) - 1 for s in range(steps)]
    return "the schedule counts batches", [learning_rate(min(b, steps), steps, peak) for b in ends]


def tail_forgotten(batches, accumulation, peak):
    """The right cause, but the last group is shorter and yet a step: one rate is missing."""
    steps = batches // accumulation
    rates = [learning_rate(step, steps, peak) for step in range(steps)]
    return "the schedule counts batches", rates


def one_per_batch(batches, accumulation, peak):
    """The right cause, but you give a rate for each batch. Weights move once per step."""
    rates = [learning_rate(batch, batches, peak) for batch in range(batches)]
    return "the schedule counts batches", rates


def no_schedule(batches, accumulation, peak):
    """The right cause. But there was nothing wrong with a rate that falls, only with its clock; yours
    never falls."""
    return "the schedule counts batches", [peak] * math.ceil(batches / accumulation)


def one_step_late(batches, accumulation, peak):
    """The right cause, but the first step should have the peak: count the steps from 0."""
    steps = math.ceil(batches / accumulation)
    rates = [learning_rate(step + 1, steps, peak) for step in range(steps)]
    return "the schedule counts batches", rates


EARLY_PLATEAU = Exercise(
    solution=early_plateau,
    cases=lambda seed: [(ward.BATCHES, ward.ACCUMULATION, ward.PEAK), (7 + 10 * seed, 5, 0.01)],
    run=run_early_plateau,
    title="Patient 2: it learns, and then it does not",
    difficulty=3,
    importance=4,
    minutes=20,
    statement=statement(
        EACH_ROW.format("second_patient"),
        """The loss falls as it should, and from about the seventh step on ever so slowly. The task is not at its end: there is no noise
in the data, so the loss could reach 0.""",
        "The check runs the patient anew with your rates.",
    ),
    hints=[
        "Plot the loss. How much of the run is over when it stops falling? What happens so often in a step?",
        "Copy the loop into a cell and print `rate` at every step.",
        "There are ceil(batches / accumulation) steps. Give `learning_rate` the number of the *step*.",
    ],
    mistakes=[never_cleared, too_small, used_up, as_it_was, tail_forgotten, one_per_batch, no_schedule,
              one_step_late],
    discussion="The same slip the other way round, a schedule that is asked for fewer steps than it counts to, "
    "never comes down: the loss is good and could have been better. Log the rate; it costs nothing.",
)  # fmt: skip


# 3. Suddenly not a number


def sudden_nan(logits: Tensor, labels: Tensor) -> tuple[str, Tensor]:
    """Return the cause of the third patient's illness, and its loss as it should be computed.

    Args:
        logits: (N, K), of any size: a row may hold 0 and 1000.
        labels: (N,), the right class of each row.

    Returns:
        one of `ward.THIRD_SUSPECTS`, word for word; and the mean of -ln p(label), a scalar.
    """
    ### BEGIN SOLUTION
    logps = logits.log_softmax(-1).gather(-1, labels[:, None])
    return "the logarithm of a probability of 0", -logps.mean()
    ### END SOLUTION


def sudden_nan_cases(seed: int) -> list[tuple]:
    draw = torch.Generator().manual_seed(seed)
    calm = torch.randn(5, 3, generator=draw)
    wild = torch.randn(4, 3, generator=draw)
    wild[1] *= 1000
    return [
        (calm, torch.tensor([0, 2, 1, 1, 0])),
        (wild, torch.tensor([1, int(wild[1].argmin()), 0, 2])),
    ]


def run_sudden_nan(function, logits, labels):
    leaf = logits.clone().requires_grad_()
    cause, loss = function(leaf, labels)
    if not diagnosed(cause, "the logarithm of a probability of 0", ward.THIRD_SUSPECTS):
        return {"cause": cause}
    (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    log = ward.third_patient(lambda *arguments: function(*arguments)[1])
    finite = all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in log)
    return {"cause": cause, "loss": loss.detach(), "gradient": gradient, "healed": finite}


def chosen(logits, labels):
    return logits.softmax(-1).gather(-1, labels[:, None])[:, 0]


def steps_too_large(logits, labels):
    """When steps are too large, loss and gradient grow before they break. Look at the ten rows before
    the end."""
    return "the learning rate is too high", F.cross_entropy(logits, labels)


def nothing_to_learn(logits, labels):
    """Every batch has sixteen labels; print the one of the last step. Which of its rows is unusual?"""
    return "a batch has no labels", F.cross_entropy(logits, labels)


def nan_in_data(logits, labels):
    """The last batch is finite, every number of it: print it. What do the functions after it make of
    such numbers?"""
    return "the data hold a NaN", F.cross_entropy(logits, labels)


def floor_under_p(logits, labels):
    """The right cause, but you added a small number inside the logarithm: the loss is finite, and the
    rows that are most wrong get no gradient."""
    return "the logarithm of a probability of 0", -(chosen(logits, labels) + 1e-9).log().mean()


def p_held_up(logits, labels):
    """The right cause, but you hold the probability up at a least value. The loss is finite, and the
    rows that are most wrong are no longer taught."""
    return "the logarithm of a probability of 0", -chosen(logits, labels).clamp(
        min=1e-12
    ).log().mean()


def logits_held(logits, labels):
    """The right cause, but you clip the logits: large ones are legal, and beyond your limit they get no
    gradient."""
    return "the logarithm of a probability of 0", F.cross_entropy(logits.clamp(-30, 30), labels)


def rows_left_out(logits, labels):
    """The right cause, but you leave out the rows that give no finite number: those are the ones that
    the model gets most wrong."""
    nll = -chosen(logits, labels).log()
    return "the logarithm of a probability of 0", nll[nll.isfinite()].mean()


def symptom_hidden(logits, labels):
    """The right cause, but you replace the infinite result by a number: that hides the symptom, and the
    gradient is as ill as before."""
    return "the logarithm of a probability of 0", -chosen(logits, labels).log().nan_to_num().mean()


def summed(logits, labels):
    """The right cause, and a loss that survives; but it is the sum over the rows, and the mean is asked
    for."""
    return "the logarithm of a probability of 0", F.cross_entropy(logits, labels, reduction="sum")


SUDDEN_NAN = Exercise(
    solution=sudden_nan,
    cases=sudden_nan_cases,
    run=run_sudden_nan,
    title="Patient 3: calm, and then not a number",
    difficulty=3,
    importance=5,
    minutes=25,
    statement=statement(
        EACH_ROW.format("third_patient"),
        """A linear model learns to sort points into three classes. Thirty steps of health, then nothing more. `ward.batch_of_points(step)`
gives the batch of a step.""",
        """The check compares loss and gradient, also where logits are large, and runs the
patient anew with your loss.""",
    ),
    hints=[
        "Was anything unusual in the rows of the log before the last? Then look at the last batch.",
        "One point is far away. What are its logits, and what is `softmax` of them, in numbers?",
        "ln softmax(x) = x - ln Σ eˣ, and the last term can be computed without a single 0: `log_softmax`.",
    ],
    mistakes=[steps_too_large, nothing_to_learn, nan_in_data, floor_under_p, p_held_up, logits_held,
              rows_left_out, symptom_hidden, summed],
    discussion="The far point has a cause of its own, and one should go and find it. But a loss that is finite "
    "for every finite input turns it from a catastrophe into one bad step, which clipping keeps small.",
)  # fmt: skip


# 4. Open-ended: an alarm


def triage(history: list[dict]) -> str:
    """Look at the log of a run and say what it is: one of `ward.KINDS`.

    Args:
        history: one row per step with `step`, `loss` (of the batch) and `heldout`.
    """
    ### BEGIN SOLUTION
    loss, held = ([row[name] for row in history] for name in ("loss", "heldout"))
    if not all(map(math.isfinite, loss + held)):
        return "not finite"
    best, last, learnt = min(held), sum(held[-10:]) / 10, sum(loss[-10:]) / 10
    if learnt > 2 * held[0]:
        return "diverges"
    if learnt < 0.5 * last and last > 1.1 * best:
        return "overfits"
    return "flat" if best > 0.9 * held[0] else "healthy"
    ### END SOLUTION


RUNS_OF_A_KIND = 3


@cache
def triage_cases(seed: int) -> list[tuple]:
    return [
        (ward.watched_run(kind, RUNS_OF_A_KIND * seed + i),)
        for kind in ward.KINDS
        for i in range(RUNS_OF_A_KIND)
    ]


def judge_triage(cases: list[tuple], results: list[str]) -> str | None:
    kinds = [kind for kind in ward.KINDS for _ in range(RUNS_OF_A_KIND)]
    for number, (kind, said) in enumerate(zip(kinds, results), start=1):
        if said not in ward.KINDS:
            return f"Run {number}: expected one of {', '.join(ward.KINDS)}; yours is {said!r}."
        if kind == "healthy" != said:
            return (
                f"Run {number} is healthy, and you call it {said!r}. An alarm that rings at healthy runs is "
                "soon switched off: noise is no illness."
            )
    wrong = [(n, k, s) for n, (k, s) in enumerate(zip(kinds, results), start=1) if k != s]
    if wrong:
        number, kind, said = wrong[0]
        return f"{len(wrong)} of {len(kinds)} runs are misjudged; run {number} is {kind!r}, and you say {said!r}."
    return None


def never_rings(history):
    """Your alarm never rings: it calls every run healthy."""
    return "healthy"


def nan_compared(history):
    """Every comparison with NaN is false, so a run that breaks down passes all your tests. Ask for NaN
    by name."""
    loss, held = ([row[name] for row in history] for name in ("loss", "heldout"))
    best, last, learnt = min(held), sum(held[-10:]) / 10, sum(loss[-10:]) / 10
    if learnt > 2 * held[0]:
        return "diverges"
    if learnt < 0.5 * last and last > 1.1 * best:
        return "overfits"
    return "flat" if best > 0.9 * held[0] else "healthy"


def training_loss_alone(history):
    """You read the training loss alone; whoever learns a few rows by heart has a splendid one. What is
    the other column for?"""
    loss = [row["loss"] for row in history]
    if not all(map(math.isfinite, loss)):
        return "not finite"
    first, last = sum(loss[:3]) / 3, sum(loss[-10:]) / 10
    return "diverges" if last > 2 * first else "flat" if last > 0.8 * first else "healthy"


def every_rise_alarms(history):
    """You ring whenever a loss is higher than the one before. Losses of batches are noisy; compare means
    of several, or with the best so far."""
    loss = [row["loss"] for row in history]
    if not all(map(math.isfinite, loss)):
        return "not finite"
    return "diverges" if any(b > a for a, b in zip(loss, loss[1:])) else "healthy"


def fixed_height(history):
    """You compare the loss with a fixed number. What is high depends on the task: compare a run with
    its own beginning."""
    last = history[-1]["heldout"]
    if not math.isfinite(last):
        return "not finite"
    return "diverges" if last > 2 else "flat" if last > 0.05 else "healthy"


TRIAGE = Exercise(
    solution=triage,
    cases=triage_cases,
    judge=judge_triage,
    title="An alarm (open-ended)",
    difficulty=3,
    importance=4,
    minutes=30,
    statement="""
Nobody watches a run for ten hours. Write what watches: given a log, say whether the run is healthy, flat, diverges, is not
finite, or overfits. `ward.watched_run("healthy", seed=7)` makes you as many logs of each kind as you like.

The check hands in fifteen runs, made while you wait. A false alarm at a healthy one counts as much as a missed illness.

Then go on. How early can you tell? Call your function after every step, and find the first at which it is right. What would it say
to the logs of your own runs (`out/course/*.log.jsonl`)? Which kinds did we forget? And what should the program *do* when it rings?
""",
    hints=[
        "Plot two runs of each kind first, both columns. What can you see, and how would you say it in numbers?",
        "Order matters: NaN first, since comparisons with it are false; then what is rough; overfitting last.",
        "Compare a run with itself: the last mean of `heldout` with its first and with its best value.",
    ],
    mistakes=[never_rings, nan_compared, training_loss_alone, every_rise_alarms, fixed_height],
    discussion="The trainer of this course has such an alarm (`minimind/guard.py`): it stops with a diagnosis at "
    "a loss that explodes or is not finite, logs spikes, and leaves the last resume point as it was.",
)

EXERCISES = [TOO_GOOD, EARLY_PLATEAU, SUDDEN_NAN, TRIAGE]
