"""Exercises 08: which tokens weigh more, the weighted loss, grading a thought, voting."""

from __future__ import annotations

import random
import re
from collections import Counter

import torch
import torch.nn.functional as F
from checks import Exercise, sentence
from torch import Tensor

TITLE = "Reasoning"
PRACTISES = (
    "weighting the tags and nothing else, dividing a weighted loss by the right thing, grading a thought "
    "step by step, and choosing among several thoughts."
)


# 1. Which tokens weigh more


def tag_weights(input_ids: Tensor, labels: Tensor, tag_ids: list[int], weight: float) -> Tensor:
    """Return the weight of every label in the loss, (B, T), float32.

    Args:
        input_ids: (B, T).
        labels: (B, T) aligned with them, not shifted: the id itself where it is trained, else -100.
        tag_ids: the ids of `<think> </think> <answer> </answer>`.
        weight: of a tag that the assistant says. Its other tokens have 1, all else has 0.
    """
    ### BEGIN SOLUTION
    is_tag = torch.isin(labels, torch.tensor(tag_ids))
    return torch.where(is_tag, weight, 1.0).masked_fill(labels == -100, 0.0)
    ### END SOLUTION


def tag_weights_cases(seed: int) -> list[tuple]:
    draw = random.Random(seed)
    a, b, c, d, e = draw.sample(range(20, 90), 5)
    #      prompt, with a tag in it    thought               answer     end, newline
    row = [1, a, 3, b, 2, 9, 3, c, d, c, 4, 5, e, 6, 2, 9]
    said = [-100] * 6 + row[6:15] + [-100]
    short = [1, a, 5, 2, 9, 3, 4, 5, b, 6, 2, 9, 0, 0, 0, 0]
    heard = [-100] * 5 + short[5:11] + [-100] * 5
    ids, labels = torch.tensor([row, short]), torch.tensor([said, heard])
    return [(ids[:1], labels[:1], [3, 4, 5, 6], 10.0), (ids, labels, [6, 3, 5, 4], 2.5)]


def prompt_tags_weighted(input_ids, labels, tag_ids, weight):
    """A tag in the *question* has a weight too; it is read, not said, and must not be trained."""
    weights = tag_weights(input_ids, labels, tag_ids, weight)
    return weights.masked_fill(torch.isin(input_ids, torch.tensor(tag_ids)), weight)


def prompt_has_ones(input_ids, labels, tag_ids, weight):
    """Your weights count tokens whose label is -100; nobody asks the model for those."""
    return torch.where(torch.isin(labels, torch.tensor(tag_ids)), weight, 1.0)


def only_tags(input_ids, labels, tag_ids, weight):
    """Only the tags are left in your loss: the thought itself would never be learnt."""
    return torch.where(torch.isin(labels, torch.tensor(tag_ids)), weight, 0.0)


def weight_added(input_ids, labels, tag_ids, weight):
    """You add the weight to the 1 that every token has; a tag is to have the weight itself."""
    weights = tag_weights(input_ids, labels, tag_ids, weight)
    return torch.where(weights == weight, weight + 1, weights)


def opening_tags_only(input_ids, labels, tag_ids, weight):
    """Some of the four tags weigh no more than text. A thought that never ends is as useless as one
    that never begins."""
    return tag_weights(input_ids, labels, [3, 5], weight)


def first_tag_only(input_ids, labels, tag_ids, weight):
    """Only the first id of the list is recognised as a tag."""
    return tag_weights(input_ids, labels, tag_ids[:1], weight)


def shifted_weights(input_ids, labels, tag_ids, weight):
    """Your weights stand one place too early. The loss will shift labels and weights together; do
    not do it here as well."""
    return tag_weights(input_ids, labels, tag_ids, weight).roll(-1, dims=1)


def weighted_between(input_ids, labels, tag_ids, weight):
    """You weight what stands *between* the tags, not the tags."""
    is_tag = torch.isin(labels, torch.tensor(tag_ids))
    inside = is_tag.long().cumsum(1) % 2 == 1
    weights = torch.where(inside & ~is_tag, weight, 1.0)
    return weights.masked_fill(labels == -100, 0.0)


TAG_WEIGHTS = Exercise(
    solution=tag_weights,
    cases=tag_weights_cases,
    title="Which tokens weigh more?",
    difficulty=1,
    importance=4,
    minutes=10,
    statement="""
An answer of 60 tokens has four tags. If one of them is missing, nobody can find the answer, or the thought goes
on for ever; if one digit is wrong, one digit is wrong. So the four tags get ten times the weight.

Ids and labels are given. Which of the two do you ask whether a token is a tag? **Before you write:** a user
writes "What does `<think>` mean?". Which weight has the tag in that question?
""",
    hints=[
        "`torch.isin(tensor, torch.tensor([3, 4]))` says for every element whether it is 3 or 4.",
        "Three kinds of place: -100, tag, other. Build the last two with `torch.where`, then blank the first.",
    ],
    mistakes=[prompt_tags_weighted, prompt_has_ones, only_tags, weight_added, opening_tags_only,
              first_tag_only, shifted_weights, weighted_between],
    discussion="The labels already know who is speaking: outside the assistant's turns they are -100, which is "
    "no tag. The package's `tag_weights` therefore takes labels alone.",
)  # fmt: skip


# 2. The weighted loss


def weighted_token_loss(logits: Tensor, labels: Tensor, weights: Tensor, normalizer: str) -> Tensor:
    """Return the weighted sum of -ln p(label[t+1] | tokens up to t), divided as `normalizer` says.

    Args:
        logits: (B, T, V).
        labels, weights: (B, T), aligned with the input ids: shift both by one here. Where a label is
            -100 its weight is 0.
        normalizer: "tokens" divides by the number of labels that are not -100, "weights" by the sum
            of the weights. Count after the shift. Without a label the loss is 0.
    """
    ### BEGIN SOLUTION
    B, T, V = logits.shape
    targets, weights = labels[:, 1:], weights[:, 1:]
    flat = logits[:, :-1].reshape(B * (T - 1), V), targets.reshape(B * (T - 1))
    nll = F.cross_entropy(*flat, ignore_index=-100, reduction="none").view(B, T - 1)
    divisor = (targets != -100).sum() if normalizer == "tokens" else weights.sum()
    return (weights * nll).sum() / divisor if divisor > 0 else (weights * nll).sum()
    ### END SOLUTION


def weighted_token_loss_cases(seed: int) -> list[tuple]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, 7, generator=generator)
    labels = torch.randint(0, 7, (3, 6), generator=generator)
    labels[0, :3] = labels[1, 5:] = -100
    labels[2, :4] = -100
    weights = torch.where(labels < 2, 10.0, 1.0) * (labels != -100)
    weights[1, 0], weights[1, 2], weights[0, 4] = 10.0, 10.0, 10.0
    light = 0.04 * (labels != -100)
    nothing = torch.full_like(labels, -100)
    return [
        (logits, labels, weights, "tokens"),
        (logits, labels, weights, "weights"),
        (logits[:2, :5], labels[:2, :5], light[:2, :5], "weights"),
        (logits, nothing, torch.zeros(3, 6), "tokens"),
        (logits, nothing, torch.zeros(3, 6), "weights"),
    ]


def terms(logits, labels, weights):
    """(-ln p, labels, weights), each (B, T-1), shifted."""
    targets = labels[:, 1:]
    nll = -logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return nll * (targets != -100), targets, weights[:, 1:]


def divided(total, divisor):
    return total / divisor if divisor > 0 else total


def divisors(targets, weights, normalizer):
    return (targets != -100).sum() if normalizer == "tokens" else weights.sum()


def labels_not_shifted(logits, labels, weights, normalizer):
    """Every position is graded on the token that it has just read."""
    pad = torch.zeros_like(logits[:, :1])
    blank = torch.full_like(labels[:, :1], -100)
    none = torch.zeros_like(weights[:, :1])
    return weighted_token_loss(torch.cat([logits, pad], 1), torch.cat([blank, labels], 1),
                               torch.cat([none, weights], 1), normalizer)  # fmt: skip


def weights_not_shifted(logits, labels, weights, normalizer):
    """Labels are shifted and weights are not: your tags' weight falls on the token after each tag."""
    nll, targets, _ = terms(logits, labels, weights)
    kept = weights[:, :-1] * (targets != -100)
    return divided((kept * nll).sum(), divisors(targets, kept, normalizer))


def normalizers_swapped(logits, labels, weights, normalizer):
    """You have the two normalisers the wrong way round."""
    other = "weights" if normalizer == "tokens" else "tokens"
    return weighted_token_loss(logits, labels, weights, other)


def always_tokens(logits, labels, weights, normalizer):
    """Whatever the normaliser is called, you divide by the number of labels."""
    return weighted_token_loss(logits, labels, weights, "tokens")


def always_weights(logits, labels, weights, normalizer):
    """Whatever the normaliser is called, you divide by the sum of the weights."""
    return weighted_token_loss(logits, labels, weights, "weights")


def all_positions_counted(logits, labels, weights, normalizer):
    """Prompt and padding are among what you divide by; the longer the prompt, the smaller your
    loss."""
    nll, targets, w = terms(logits, labels, weights)
    divisor = torch.tensor(targets.numel()) if normalizer == "tokens" else w.sum()
    return divided((w * nll).sum(), divisor)


def counted_before_the_shift(logits, labels, weights, normalizer):
    """You count labels or weights before the shift; the first of a row is never guessed."""
    nll, _, w = terms(logits, labels, weights)
    return divided((w * nll).sum(), divisors(labels, weights, normalizer))


def mean_of_rows(logits, labels, weights, normalizer):
    """You divide row by row and average the rows: the tokens of a short answer then weigh more."""
    nll, targets, w = terms(logits, labels, weights)
    by_row = (targets != -100).sum(1) if normalizer == "tokens" else w.sum(1)
    rows = (w * nll).sum(1) / torch.where(by_row > 0, by_row, 1)
    return rows.mean()


def nothing_is_nan(logits, labels, weights, normalizer):
    """A batch without a single label divides 0 by 0, and one NaN spoils all weights of the model."""
    nll, targets, w = terms(logits, labels, weights)
    return (w * nll).sum() / divisors(targets, w, normalizer)


def at_least_one(logits, labels, weights, normalizer):
    """Your guard against a division by zero changes the divisor when the weights are merely
    small."""
    nll, targets, w = terms(logits, labels, weights)
    return (w * nll).sum() / divisors(targets, w, normalizer).clamp(min=1)


def logits_weighted(logits, labels, weights, normalizer):
    """You multiply the logits by the weight. That changes what the model predicts, and not how much
    the prediction counts."""
    scaled = logits.clone()
    scaled[:, :-1] *= weights[:, 1:, None]
    nll, targets, w = terms(scaled, labels, weights)
    return divided(nll.sum(), divisors(targets, w, normalizer))


WEIGHTED_TOKEN_LOSS = Exercise(
    solution=weighted_token_loss,
    cases=weighted_token_loss_cases,
    title="The weighted loss",
    difficulty=2,
    importance=4,
    minutes=20,
    statement="""
With weights $w_t$ the sum is clear; what to divide it by is not.

$$\\mathcal{L}_\\text{tokens} = \\frac{\\sum_t w_{t+1}\\,(-\\ln p_{t+1})}{\\#\\{t : \\text{label}_{t+1} \\ne -100\\}}, \\qquad
\\mathcal{L}_\\text{weights} = \\frac{\\sum_t w_{t+1}\\,(-\\ln p_{t+1})}{\\sum_t w_{t+1}}$$

The first is what the original did. Its value grows with the weight, although the model is the same; the second
is a mean. Write both. **Before you write:** which of the two can you compare between a run with weight 1 and a run
with weight 10?
""",
    hints=[
        '`F.cross_entropy(..., reduction="none")` gives one number per token; weight first, then sum.',
        "Shift labels *and* weights with `[:, 1:]`, logits with `[:, :-1]`.",
        "No label at all: both numerator and divisor are 0. Return the numerator; it still has a gradient.",
    ],
    mistakes=[labels_not_shifted, weights_not_shifted, normalizers_swapped, always_tokens, always_weights,
              all_positions_counted, counted_before_the_shift, mean_of_rows, nothing_is_nan, at_least_one,
              logits_weighted],
    discussion="Strictly, neither can be compared: the mean with weight 10 is mostly a mean over tags. Log the "
    "unweighted loss beside the one you train; `minimind.stages.reason` calls it `nll`.",
)  # fmt: skip


# 3. Grade a thought


def wrong_steps(problem: str, thought: str) -> list[int]:
    """Return the numbers (from 1) of the operations that a thought gets wrong, in order.

    A problem `a6;b+5;c*8;` starts with 6 and has two operations, modulo 10. A right thought is
    `a6;b+5=1;c*8=8;`. Operation n is wrong if the thought's n-th step is missing, is not of the form
    letter, sign, digit, `=`, digit, does not repeat the operation of the problem, or has a result that
    does not follow from the result *that the thought wrote* for the step before (if that cannot be
    read: from whatever was written last that could).

    Args:
        problem: well formed; the thought may be anything.
    """
    ### BEGIN SOLUTION
    operations = problem.strip(";").split(";")
    steps = thought.strip(";").split(";")[1:]
    value, wrong = int(operations[0][1:]), []
    for number, operation in enumerate(operations[1:], start=1):
        step = steps[number - 1] if number <= len(steps) else ""
        form = re.fullmatch(r"([a-z][+*-]\d)=(\d)", step)
        if form is None:
            wrong.append(number)
            continue
        sign, operand, written = operation[1], int(operation[2]), int(form[2])
        right = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 10
        if form[1] != operation or written != right:
            wrong.append(number)
        value = written
    return wrong
    ### END SOLUTION


def chain(draw: random.Random, operations: int) -> tuple[str, list[str]]:
    """A problem and the right steps (the start is the first of them)."""
    value = draw.randrange(2, 10)
    problem, steps = [f"a{value}"], [f"a{value}"]
    for letter in "bcdefgh"[:operations]:
        sign, operand = draw.choice("+-*"), draw.randrange(3, 10, 2)
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 10
        problem.append(f"{letter}{sign}{operand}")
        steps.append(f"{letter}{sign}{operand}={value}")
    return ";".join(problem) + ";", steps


def text_of(steps: list[str]) -> str:
    return ";".join(steps) + ";"


def carried_on(value: int, problem: str, first: int) -> list[str]:
    """The operations of `problem` from number `first` on, worked correctly from `value`."""
    steps = []
    for operation in problem.strip(";").split(";")[first:]:
        sign, operand = operation[1], int(operation[2])
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 10
        steps.append(f"{operation}={value}")
    return steps


def wrong_steps_cases(seed: int) -> list[tuple]:
    draw = random.Random(seed)
    cases = [("a6;b+5;c*8;", "a6;b+5=1;c*8=8;"), ("a6;b+5;c*8;", "a6;b+5=2;c*8=6;")]
    for operations, at in ((4, 2), (5, 1), (6, 3)):  # one slip, then carried on correctly
        problem, steps = chain(draw, operations)
        value = (int(steps[at][-1]) + draw.choice([1, 3])) % 10
        slipped = [*steps[:at], f"{steps[at][:-1]}{value}", *carried_on(value, problem, at + 1)]
        cases.append((problem, text_of(slipped)))
    problem, steps = chain(draw, 4)
    cases.append((problem, text_of(steps[:3])))  # stops too early
    cases.append((problem, text_of([steps[0], steps[1], "nonsense", *steps[3:]])))
    copied = "b" + ("+-"[steps[1][1] == "+"]) + steps[1][2:]  # another sign, the right result
    cases.append((problem, text_of([steps[0], copied, *steps[2:]])))
    miscopied = chain(draw, 4)  # another operand, computed correctly, and carried on
    other = miscopied[0].split(";")
    other[2] = other[2][:2] + str(int(other[2][2]) - 1)
    start = int(other[0][1:])
    cases.append((miscopied[0], text_of([other[0], *carried_on(start, ";".join(other), 1)])))
    late = f"{steps[4][:-1]}{(int(steps[4][-1]) + 4) % 10}"  # a slip in the last step alone
    cases.append((problem, text_of([*steps[:4], late])))
    cases += [("a2;b-5;c-6;", "a2;b-5=7;c-6=1;"), ("a7;b*9;", "a7;b*9=63;"), ("a7;b*9;", "")]
    return cases


def graded(problem, thought, from_true=False, arithmetic=True, copying=True):
    """`wrong_steps` with a rule left out."""
    operations, steps = problem.strip(";").split(";"), thought.strip(";").split(";")[1:]
    value, wrong = int(operations[0][1:]), []
    for number, operation in enumerate(operations[1:], start=1):
        step = steps[number - 1] if number <= len(steps) else ""
        form = re.fullmatch(r"([a-z]([+*-])(\d))=(\d)", step)
        used = operation if copying or form is None else form[1]
        sign, operand = used[1], int(used[2])
        right = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 10
        written = int(form[4]) if form else None
        if form is None or (copying and form[1] != operation) or (arithmetic and written != right):
            wrong.append(number)
        value = right if from_true else value if written is None else written
    return wrong


def judged_by_the_truth(problem, thought):
    """After one slip you call every later step wrong, though each follows from the one before. Then
    you cannot say *where* a thought went wrong."""
    return graded(problem, thought, from_true=True)


def only_the_first(problem, thought):
    """You stop at the first wrong step; asked for are all of them."""
    return wrong_steps(problem, thought)[:1]


def only_the_end(problem, thought):
    """You look at the last result only. That is grading the answer, and says nothing of the
    thought."""
    steps = thought.strip(";").split(";")
    operations = problem.strip(";").split(";")
    right = carried_on(int(operations[0][1:]), problem, 1)[-1]
    return [] if steps[-1][-1:] == right[-1] else [len(operations) - 1]


def arithmetic_not_checked(problem, thought):
    """You check that the operations are copied, not what they give."""
    return graded(problem, thought, arithmetic=False)


def copying_not_checked(problem, thought):
    """A step that works on *another* operation than the problem's passes, if only it is computed
    correctly."""
    return graded(problem, thought, copying=False)


def missing_is_fine(problem, thought):
    """Steps that were never written are not among yours: an empty thought would be perfect."""
    written = len(thought.strip(";").split(";")) - 1
    return [n for n in wrong_steps(problem, thought) if n <= written]


def counted_from_zero(problem, thought):
    """Your numbers start at 0; the first operation has the number 1."""
    return [number - 1 for number in wrong_steps(problem, thought)]


def counted_with_the_start(problem, thought):
    """You count the start `a6` as the first operation."""
    return [number + 1 for number in wrong_steps(problem, thought)]


def unreadable_is_skipped(problem, thought):
    """A step that cannot be read is wrong too; you pass over it."""
    steps = thought.strip(";").split(";")[1:]
    form = r"[a-z][+*-]\d=\d"
    return [
        n for n in wrong_steps(problem, thought) if n > len(steps) or re.fullmatch(form, steps[n - 1])
    ]  # fmt: skip


def no_modulo(problem, thought):
    """You forget that everything is counted modulo 10: 7*9 is 3 here."""
    operations, steps = problem.strip(";").split(";"), thought.strip(";").split(";")[1:]
    value, wrong = int(operations[0][1:]), []
    for number, operation in enumerate(operations[1:], start=1):
        form = re.fullmatch(
            r"([a-z]([+*-])(\d))=(\d+)", steps[number - 1] if number <= len(steps) else ""
        )
        sign, operand = operation[1], int(operation[2])
        right = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
        if form is None or form[1] != operation or int(form[4]) != right:
            wrong.append(number)
        value = value if form is None else int(form[4])
    return wrong


WRONG_STEPS = Exercise(
    solution=wrong_steps,
    cases=wrong_steps_cases,
    title="Grade a thought, not only its answer",
    difficulty=3,
    importance=5,
    minutes=25,
    statement="""
Counting modulo 10, a thought that goes wrong still ends on the right number about once in ten times. Who grades
answers alone pays for luck. So grade the steps.

`wrong_steps("a6;b+5;c*8;", "a6;b+5=2;c*8=6;")` is `[1]`: 6+5 is 1 and not 2, so the first operation is wrong. The
second is **not**: from the 2 that was written, 2·8 = 16, and 6 stands there. One slip, carried on correctly, is one
mistake, and you know where it happened.
""",
    hints=[
        "Walk along the problem's operations with a number; fetch the thought's step of that number, if there is one.",
        "Keep one variable for the value. After each step it takes the value that was *written*.",
        "`re.fullmatch(r'([a-z][+*-]\\d)=(\\d)', step)` reads a step or gives None. Python's `%` is right for "
        "negative numbers too: `(2 - 5) % 10` is 7.",
    ],
    mistakes=[judged_by_the_truth, only_the_first, only_the_end, arithmetic_not_checked, copying_not_checked,
              missing_is_fine, counted_from_zero, counted_with_the_start, unreadable_is_skipped, no_modulo],
    discussion="A reward for right answers is an *outcome* reward, one for right steps a *process* reward (Lightman "
    "et al., arXiv 2305.20050). Here a program can grade steps; for prose somebody must train a model to.",
)  # fmt: skip


# 4. Open-ended: choose among several thoughts


def choose(texts: list[str]) -> str | None:
    """Return the answer to believe, given several texts sampled for one problem; None if no text has one.

    A sound text is `<think>…</think><answer>…</answer>`. Others are cut off or lack a part. White space
    around an answer does not matter.
    """
    ### BEGIN SOLUTION
    sound = [
        re.fullmatch(r"<think>.*</think><answer>(.+)</answer>", t.strip(), re.DOTALL) for t in texts
    ]
    votes = Counter(found[1].strip() for found in sound if found)
    return votes.most_common(1)[0][0] if votes else None
    ### END SOLUTION


def samples_of(draw: random.Random, problem: str, steps: list[str], number: int) -> list[str]:
    """Texts for one problem: 45% right in varying words, 30% wrong and longer, 25% cut off."""
    texts, right = [], steps[-1][-1]
    for i in range(number):
        lead = draw.choice(["", " ", "so ", "well ", "\n"]) + "hm " * draw.randrange(4)
        kind = draw.random()
        if kind < 0.45:
            space = draw.choice(["", "", " "])
            texts.append(
                f"<think>{lead}{text_of(steps)}</think><answer>{space}{right}{space}</answer>"
            )
        elif kind < 0.75:
            wrong = draw.choice([d for d in "0123456789" if d != right])
            long = "hm " * draw.randrange(4, 9) + str(i)
            texts.append(f"<think>{lead}{long}{text_of(steps)}</think><answer>{wrong}</answer>")
        else:  # it always breaks off at the same operand, or forgets to think
            digit = str((int(right) + 5) % 10)
            cut = f"<think>{text_of(steps[:-1])}{digit}"
            texts.append(draw.choice([cut, f"<answer>{digit}</answer>"]))
    return texts


def choose_cases(seed: int) -> list[tuple]:
    draw = random.Random(seed)
    problems, truths = [], []
    for _ in range(300):
        problem, steps = chain(draw, 4)
        problems.append(samples_of(draw, problem, steps, 11))
        truths.append(steps[-1][-1])
    return [(problems, truths)]


def run_choose(function, problems, truths):
    cut = [function(["<think>a6;b+5=1;", "7", "<think>a6;b"]), function([])]
    return {"chosen": [function(texts) for texts in problems], "nothing": cut}


def judge_choose(cases: list[tuple], results: list[dict]) -> str | None:
    (problems, truths), result = cases[0], results[0]
    if any(answer is not None for answer in result["nothing"]):
        return sentence(cut_off_counts)
    if not any(result["chosen"]):
        return "You return None for every problem, though most of their texts have an answer."
    right = sum(str(a) == t for a, t in zip(result["chosen"], truths)) / len(truths)
    alone = sum(choose(texts[:1]) == t for texts, t in zip(problems, truths)) / len(truths)
    voted = sum(choose(texts) == t for texts, t in zip(problems, truths)) / len(truths)
    if right > voted - 0.03:
        return None
    return (
        f"You choose the right answer for {right:.0%} of the problems. One text alone gives {alone:.0%}; "
        f"with eleven texts {voted - 0.03:.0%} can be reached without solving anything yourself."
    )


def first_text(texts):
    """You take the first sound text and throw the others away."""
    return next((answer for answer in map(lambda t: choose([t]), texts) if answer), None)


def longest_thought(texts):
    """You believe the longest text. Many words are no sign of a right thought."""
    sound = [text for text in texts if choose([text])]
    return choose([max(sound, key=len)]) if sound else None


def shortest_thought(texts):
    """You believe the shortest text, which is often one that forgot to think."""
    found = [re.search(r"<answer>(.+)</answer>", text) for text in sorted(texts, key=len)]
    return next((f[1].strip() for f in found if f), None)


def most_common_text(texts):
    """You count whole texts. Two thoughts in other words with one answer are two votes for it."""
    sound = [text for text in texts if choose([text])]
    return choose([Counter(sound).most_common(1)[0][0]]) if sound else None


def rarest_answer(texts):
    """You choose the answer that the *fewest* texts agree on."""
    votes = Counter(choose([text]) for text in texts if choose([text]))
    return votes.most_common()[-1][0] if votes else None


def mean_answer(texts):
    """You average the answers. Between a 1 and a 9 there is no 5 that anybody believes in."""
    found = [int(choose([text])) for text in texts if choose([text])]
    return str(round(sum(found) / len(found))) if found else None


def cut_off_counts(texts):
    """A text that breaks off has no answer, but you find a number in it. Say None if there is nothing to
    believe."""
    found = [re.findall(r"\d", text) for text in texts]
    votes = Counter(digits[-1] for digits in found if digits)
    return votes.most_common(1)[0][0] if votes else None


CHOOSE = Exercise(
    solution=choose,
    cases=choose_cases,
    run=run_choose,
    judge=judge_choose,
    title="Eleven thoughts are better than one (open-ended)",
    difficulty=2,
    importance=4,
    minutes=25,
    statement="""
A model that thinks gives another thought each time you sample. There are many ways to be wrong and one to be
right, so right answers meet. Choose!

The check gives you eleven texts for each of 300 problems: some right, some wrong (and wordier), some cut off or
without a thought. It does not give you the problems, and compares how often you choose the right answer with what is
within reach.

Then try it on the real model: sample 11 thoughts at temperature 1 for chains of seven operations and plot the
accuracy against the number of thoughts. Where does it stop to grow? What does it cost, in tokens per answer?
""",
    hints=[
        "What do you compare: texts, thoughts, or answers?",
        "Read the answer of each sound text, count the answers with a `Counter`.",
    ],
    mistakes=[first_text, longest_thought, shortest_thought, most_common_text, rarest_answer, mean_answer,
              cut_off_counts],
    discussion="This is self-consistency (Wang et al., arXiv 2203.11171). It needs no training, and multiplies "
    "the cost of every answer. With `wrong_steps` you could do better: let only sound thoughts vote.",
)  # fmt: skip

EXERCISES = [TAG_WEIGHTS, WEIGHTED_TOKEN_LOSS, WRONG_STEPS, CHOOSE]
