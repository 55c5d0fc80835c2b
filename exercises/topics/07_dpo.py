"""Exercises 07: probabilities of answers, the best policy, DPO's loss, its reference, its data."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from checks import Exercise, sentence
from torch import Tensor, nn

TITLE = "Direct preference optimisation"
PRACTISES = (
    "scoring whole answers, the optimum of RLHF in closed form, the loss that follows from it, "
    "keeping the reference without keeping a second model, and choosing pairs that teach what they "
    "should."
)


# 1. The probability of an answer


def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ln π(answer | prompt) of every row.

    Args:
        logits: (B, T, V); those at position t predict token t + 1.
        labels: (B, T), aligned with the tokens: the token itself in the answer, -100 in prompt and
            padding. The label in the first column is never used.

    Returns:
        (B,), in nats.
    """
    ### BEGIN SOLUTION
    logps = logits[:, :-1].log_softmax(-1)  # (B, T-1, V)
    targets = labels[:, 1:]
    chosen = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]  # (B, T-1)
    return (chosen * (targets != -100)).sum(-1)
    ### END SOLUTION


def sequence_logps_cases(seed: int) -> list[tuple]:
    make = torch.Generator().manual_seed(seed)

    def case(B: int, T: int, V: int, spans: list[tuple[int, int]]) -> tuple:
        labels = torch.full((B, T), -100)
        for row, (start, end) in enumerate(spans):
            labels[row, start:end] = torch.randint(V, (end - start,), generator=make)
        return 2 * torch.randn(B, T, V, generator=make), labels

    return [case(2, 4, 3, [(2, 4), (2, 4)]), case(3, 7, 5, [(2, 7), (3, 5), (1, 2)])]


def picked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets (B, T-1), and which of them count."""
    targets = labels[:, 1:]
    logps = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return logps, targets != -100


def mean_over_answer(logits, labels):
    """You average over the tokens; the probability of an answer is the product of theirs."""
    return sequence_logps(logits, labels) / picked(logits, labels)[1].sum(-1)


def mean_over_positions(logits, labels):
    """You divide by the number of positions, prompt and padding included; nothing is to be divided."""
    return sequence_logps(logits, labels) / (labels.shape[1] - 1)


def labels_not_shifted(logits, labels):
    """You look up each token in the logits of its own position, where it has already been read."""
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (logps * (labels != -100)).sum(-1)


def shifted_by_two(logits, labels):
    """Your logits and labels are two positions apart; the next token is one ahead."""
    return sequence_logps(logits[:, :-1], labels[:, 1:])


def everything_counted(logits, labels):
    """You count positions whose label is -100, as if token 0 stood there."""
    return picked(logits, labels)[0].sum(-1)


def no_softmax(logits, labels):
    """You add up logits; they are not yet log-probabilities."""
    targets = labels[:, 1:]
    raw = logits[:, :-1].gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (raw * (targets != -100)).sum(-1)


def no_logarithm(logits, labels):
    """You add up probabilities; those of one answer are multiplied, so it is logs that add up."""
    logps, counts = picked(logits, labels)
    return (logps.exp() * counts).sum(-1)


def softmax_over_time(logits, labels):
    """Your probabilities sum to one over the positions, not over the vocabulary."""
    logps = logits[:, :-1].log_softmax(1)
    targets = labels[:, 1:]
    return (logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)).sum(-1)


def loss_returned(logits, labels):
    """You return a loss: a log-probability is never above zero."""
    return -sequence_logps(logits, labels)


def batch_summed(logits, labels):
    """You add up the rows too; every answer needs its own number."""
    return sequence_logps(logits, labels).sum()


SEQUENCE_LOGPS = Exercise(
    solution=sequence_logps,
    cases=sequence_logps_cases,
    title="How likely is a whole answer?",
    difficulty=2,
    importance=5,
    minutes=15,
    statement="""
DPO compares *answers*, so it needs the probability of a whole one. By the chain rule that is the product
of its tokens' probabilities, and its logarithm a sum. Nothing is divided by the length: the derivation
speaks of $\\pi(y \\mid x)$, and that is what this is.

Prompt and padding have the label −100 and must not count. **Before you write:** which logits predict the
first token of the answer?
""",
    hints=[
        "Cut the last position off the logits and the first off the labels; then they face each other.",
        "`gather` picks one number of the vocabulary per position. It cannot look up −100: put any valid "
        "index there and drop the result afterwards.",
    ],
    mistakes=[mean_over_answer, mean_over_positions, labels_not_shifted, shifted_by_two,
              everything_counted, no_softmax, no_logarithm, softmax_over_time, loss_returned,
              batch_summed],
    discussion="The sum makes longer answers less likely, for both sides of a pair. In the margin against "
    "a reference most of that cancels; not all of it. Section 9 of the lesson measures what is left.",
)  # fmt: skip


# 2. The optimum in closed form


def optimal_policy(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Return the policy with the largest (mean reward - beta · KL(policy ‖ reference)).

    Args:
        reference: (N, K) probabilities of the K possible answers to each of N prompts.
        rewards: (N, K); they may be large.
        beta: what one nat of KL costs; above 0.

    Returns:
        (N, K) probabilities.
    """
    ### BEGIN SOLUTION
    return (reference.log() + rewards / beta).softmax(-1)
    ### END SOLUTION


def optimal_policy_cases(seed: int) -> list[tuple]:
    make = torch.Generator().manual_seed(seed)
    reference = torch.randn(3, 5, generator=make).softmax(-1)
    rewards = torch.randn(3, 5, generator=make)
    return [
        (torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.0, 1.0, 2.0]]), 1.0),
        (reference, rewards, 0.4),
        (reference, 300 * rewards, 2.0),
    ]


def reference_forgotten(reference, rewards, beta):
    """Your policy does not depend on the reference at all, so nothing keeps it close."""
    return (rewards / beta).softmax(-1)


def beta_multiplied(reference, rewards, beta):
    """A large beta should keep your policy near the reference; yours makes it greedier."""
    return (reference.log() + rewards * beta).softmax(-1)


def beta_forgotten(reference, rewards, beta):
    """Nothing in your policy depends on beta."""
    return (reference.log() + rewards).softmax(-1)


def over_the_prompts(reference, rewards, beta):
    """You normalise over the prompts; probabilities of the answers to one prompt must sum to one."""
    return (reference.log() + rewards / beta).softmax(0)


def over_everything(reference, rewards, beta):
    """You divide by one number for all prompts; each prompt has a partition function of its own."""
    weights = reference.log() + rewards / beta
    return weights.flatten().softmax(0).view(weights.shape)


def not_a_logarithm(reference, rewards, beta):
    """You add a probability to a reward inside the exponential; what multiplies outside is added
    inside as a logarithm."""
    return (reference + rewards / beta).softmax(-1)


def not_normalised(reference, rewards, beta):
    """Your numbers are in the right proportion but do not sum to one."""
    return reference * (rewards / beta).exp()


def overflows(reference, rewards, beta):
    """Right on paper, but e to the power of a large reward is infinite in floating point."""
    weights = reference * (rewards / beta).exp()
    return weights / weights.sum(-1, keepdim=True)


OPTIMAL_POLICY = Exercise(
    solution=optimal_policy,
    cases=optimal_policy_cases,
    title="The best policy there is",
    difficulty=2,
    importance=4,
    minutes=15,
    statement="""
If there are only K answers to a prompt, nobody needs to train. The policy that maximises
$\\mathbb{E}_{y\\sim\\pi}[r(y)] - \\beta\\,\\mathrm{KL}(\\pi\\,\\|\\,\\pi_\\text{ref})$ is

$$\\pi^*(y \\mid x) = \\frac{1}{Z(x)}\\,\\pi_\\text{ref}(y \\mid x)\\,e^{r(x, y)/\\beta}.$$

Write it so that it survives large rewards. **Before you write:** what is it for β → 0, and for β → ∞?
""",
    hints=[
        "Everything under one exponential: what becomes of the factor π_ref?",
        "`softmax` divides by Z for you, and subtracts the largest exponent first.",
    ],
    mistakes=[reference_forgotten, beta_multiplied, beta_forgotten, over_the_prompts, over_everything,
              not_a_logarithm, not_normalised, overflows],
    discussion="β → 0: all probability on the best answer. β → ∞: the reference. A language model has too "
    "many answers to sum over; Z is out of reach, and DPO is the trick that does without it.",
)  # fmt: skip


# 3. The loss


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:  # fmt: skip
    """Return DPO's loss, the mean over B pairs.

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected: (B,) log-probabilities of whole
            answers under the model in training and under its reference.
        beta: above 0.
    """
    ### BEGIN SOLUTION
    chosen_reward = beta * (policy_chosen - ref_chosen)
    rejected_reward = beta * (policy_rejected - ref_rejected)
    return -F.logsigmoid(chosen_reward - rejected_reward).mean()
    ### END SOLUTION


def dpo_loss_cases(seed: int) -> list[tuple]:
    make = torch.Generator().manual_seed(seed)
    near = [-20 + 4 * torch.randn(5, generator=make) for _ in range(4)]
    far = [torch.tensor([-900.0, -20.0, -35.0]), torch.tensor([-20.0, -700.0, -31.0]),
           torch.tensor([-30.0, -25.0, -33.0]), torch.tensor([-22.0, -40.0, -36.0])]  # fmt: skip
    return [(*near, 0.1), (*near, 0.7), (*far, 0.5)]


def margins(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    return beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))


def without_reference(pc, pr, rc, rr, beta):
    """Your loss does not look at the reference; whatever was likely before counts as preferred."""
    return -F.logsigmoid(beta * (pc - pr)).mean()


def sides_swapped(pc, pr, rc, rr, beta):
    """You teach the model to prefer the rejected answer."""
    return -F.logsigmoid(-margins(pc, pr, rc, rr, beta)).mean()


def reference_backwards(pc, pr, rc, rr, beta):
    """The reference enters with the wrong sign: a reward is what the policy says *more* than it."""
    return -F.logsigmoid(beta * ((pc + rc) - (pr + rr))).mean()


def beta_outside(pc, pr, rc, rr, beta):
    """Your beta scales the loss; inside the sigmoid it decides when a pair has been learnt."""
    return -beta * F.logsigmoid(margins(pc, pr, rc, rr, 1.0)).mean()


def beta_left_out(pc, pr, rc, rr, beta):
    """Nothing in your loss depends on beta."""
    return -F.logsigmoid(margins(pc, pr, rc, rr, 1.0)).mean()


def summed_over_pairs(pc, pr, rc, rr, beta):
    """You add up the pairs, so that a larger batch means a larger step."""
    return -F.logsigmoid(margins(pc, pr, rc, rr, beta)).sum()


def sigmoid_of_the_mean(pc, pr, rc, rr, beta):
    """You average the margins first: one easy pair then makes up for all hard ones."""
    return -F.logsigmoid(margins(pc, pr, rc, rr, beta).mean())


def minus_forgotten(pc, pr, rc, rr, beta):
    """A loss is minimised; yours is a log-likelihood, which should grow."""
    return F.logsigmoid(margins(pc, pr, rc, rr, beta)).mean()


def log_forgotten(pc, pr, rc, rr, beta):
    """You return a probability of error; maximum likelihood wants the logarithm of σ."""
    return torch.sigmoid(-margins(pc, pr, rc, rr, beta)).mean()


def log_of_sigmoid(pc, pr, rc, rr, beta):
    """Right on paper, but for a pair that is far off σ rounds to 0 and its logarithm is infinite."""
    return -torch.sigmoid(margins(pc, pr, rc, rr, beta)).log().mean()


def ratio_of_logps(pc, pr, rc, rr, beta):
    """You divide log-probabilities; the logarithm of a ratio is a difference."""
    return -F.logsigmoid(beta * (pc / rc - pr / rr)).mean()


DPO_LOSS = Exercise(
    solution=dpo_loss,
    cases=dpo_loss_cases,
    title="The loss",
    difficulty=2,
    importance=5,
    minutes=15,
    statement="""
The reward that a policy *implies* is $\\hat r(x, y) = \\beta\\ln\\frac{\\pi(y\\mid x)}{\\pi_\\text{ref}(y\\mid x)}$, up
to a term that depends on the prompt alone. The Bradley-Terry model says how likely it is that the chosen
answer wins: $\\sigma(\\hat r_\\text{chosen} - \\hat r_\\text{rejected})$. The loss is the negative log-likelihood of
that, averaged over the pairs.

**Before you write:** what is it when the policy is the reference?
""",
    hints=[
        "Two rewards, one margin, one sigmoid, one logarithm, one mean: in this order.",
        "PyTorch has the logarithm of the sigmoid as one function, which does not underflow.",
    ],
    mistakes=[without_reference, sides_swapped, reference_backwards, beta_outside, beta_left_out,
              summed_over_pairs, sigmoid_of_the_mean, minus_forgotten, log_forgotten, log_of_sigmoid,
              ratio_of_logps],
    discussion="At the reference every margin is 0 and the loss is ln 2 = 0.693, whatever beta, model and "
    "data are. If your first logged loss is another one, reference and policy were not computed alike.",
)  # fmt: skip


# 4. The reference without a second model


def stored_reference(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], logps: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:  # fmt: skip
    """Compute the reference's log-probabilities once, before training changes the model.

    Args:
        model: input ids (B, T) to logits (B, T, V). It has dropout. It is the model that will be
            trained next, so leave it exactly as you found it.
        batches: pairs (input_ids, labels), each (B, T), of unequal sizes.
        logps: your `sequence_logps`: (logits, labels) to (B,).

    Returns:
        (N,) the numbers of all rows, in order, without a gradient.
    """
    ### BEGIN SOLUTION
    was_training = model.training
    model.eval()
    with torch.no_grad():
        found = torch.cat([logps(model(input_ids), labels) for input_ids, labels in batches])
    model.train(was_training)
    return found
    ### END SOLUTION


def stored_reference_cases(seed: int) -> list[tuple]:
    make = torch.Generator().manual_seed(seed)

    def batch(B: int, T: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(11, (B, T), generator=make)
        labels = ids.clone()
        labels[:, : T // 2] = -100
        return ids, labels

    return [(seed, [batch(3, 6), batch(2, 9)], True), (seed + 1, [batch(4, 5)], False)]


def run_stored_reference(function, seed, batches, training):
    """Build the model, call, and look at what has become of it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Dropout(0.4), nn.Linear(8, 11)).train(training)
    found = function(model, batches, sequence_logps)
    return {
        "found": found,
        "has a gradient": bool(getattr(found, "requires_grad", False)),
        "model is training": model.training,
        "model can be trained": all(p.requires_grad for p in model.parameters()),
    }


def dropout_left_on(model, batches, logps):
    """Your reference was computed with dropout, so it is another one each time you ask."""
    with torch.no_grad():
        return torch.cat([logps(model(ids), labels) for ids, labels in batches])


def graph_kept(model, batches, logps):
    """Your numbers hang on to the graph of the model: memory grows, and a gradient could reach the
    reference."""
    was_training = model.training
    model.eval()
    found = torch.cat([logps(model(ids), labels) for ids, labels in batches])
    model.train(was_training)
    return found


def left_in_eval(model, batches, logps):
    """You leave the model in evaluation mode, and it will be trained without dropout."""
    found = stored_reference(model, batches, logps)
    model.eval()
    return found


def always_to_training(model, batches, logps):
    """You end in training mode, even if the model was not in it when you got it."""
    found = stored_reference(model, batches, logps)
    model.train()
    return found


def frozen_for_good(model, batches, logps):
    """You froze the parameters: training will run, and nothing will change."""
    found = stored_reference(model, batches, logps)
    model.requires_grad_(False)
    return found


def only_the_last_batch(model, batches, logps):
    """You return the last batch only; every row needs its number."""
    return stored_reference(model, batches[-1:], logps)


def one_number_per_batch(model, batches, logps):
    """You return one number per batch; DPO subtracts row by row."""
    return torch.stack([stored_reference(model, [batch], logps).mean() for batch in batches])


STORED_REFERENCE = Exercise(
    solution=stored_reference,
    cases=stored_reference_cases,
    run=run_stored_reference,
    title="A reference without a second model",
    difficulty=3,
    importance=4,
    minutes=15,
    statement="""
The reference never changes. So all that training needs of it are two numbers per pair, and they can be
computed before the first step with the very model that is then trained: no copy, no second model in
memory.

It is easily done wrong in ways that only cost quality: nothing crashes. **Before you write:** which two
things distinguish a forward pass of a reference from one of training? And what must be as before when
you are done?
""",
    hints=[
        "One of the two is about gradients, the other about layers that behave differently in training.",
        "`model.training` says in which mode it is; `model.train(flag)` sets it.",
    ],
    mistakes=[dropout_left_on, graph_kept, left_in_eval, always_to_training, frozen_for_good,
              only_the_last_batch, one_number_per_batch],
    discussion="`minimind.stages.dpo.pair_logps` does this. A further trap: use the number format of "
    "training (bfloat16, say) for the reference too, or the first loss is not ln 2.",
)  # fmt: skip


# 5. Open-ended: which pairs?


def make_pairs(samples: list[list[tuple[float, int]]], gap: float) -> list[tuple[int, int, int]]:
    """Choose pairs from answers that were sampled and scored.

    Args:
        samples: for every prompt its answers as (score, length in tokens).
        gap: the scores of a pair must differ by at least this much.

    Returns:
        Pairs (prompt, chosen, rejected) as numbers into `samples`; none twice. At least two for
        each prompt on average, and on average the chosen answers are as long as the rejected ones.
    """
    ### BEGIN SOLUTION
    pairs, drift = [], 0
    for prompt, answers in enumerate(samples):
        possible = [
            (i, j)
            for i, (good, _) in enumerate(answers)
            for j, (bad, _) in enumerate(answers)
            if good - bad >= gap
        ]
        for _ in range(min(3, len(possible))):
            best = min(possible, key=lambda p: abs(drift + answers[p[0]][1] - answers[p[1]][1]))
            possible.remove(best)
            drift += answers[best[0]][1] - answers[best[1]][1]
            pairs.append((prompt, *best))
    return pairs
    ### END SOLUTION


def make_pairs_cases(seed: int) -> list[tuple]:
    """Scores of a judge who likes long answers, rounded so that there are ties."""
    draw = random.Random(seed)
    samples = []
    for _ in range(60):
        lengths = [draw.randint(5, 60) for _ in range(8)]
        samples.append([(round(draw.gauss(length / 20, 1.0), 1), length) for length in lengths])
    return [(samples, 0.5)]


def judge_make_pairs(cases: list[tuple], results: list[list]) -> str | None:
    (samples, gap), pairs = cases[0], results[0]
    if len(set(map(tuple, pairs))) < len(pairs):
        return "A pair occurs twice; it would count double and teach nothing new."
    if any(not 0 <= n < len(samples) or min(i, j) < 0 for n, i, j in pairs):
        return "A pair names a prompt or an answer that does not exist."
    gaps = [samples[n][i][0] - samples[n][j][0] for n, i, j in pairs]
    if sum(g < 0 for g in gaps) > len(gaps) / 2:
        return sentence(worst_first)
    if not pairs or min(gaps) < gap - 1e-9:
        return sentence(ties_included) + f" Asked for is a gap of {gap}."
    if len(pairs) < 2 * len(samples):
        return f"{len(pairs)} pairs for {len(samples)} prompts are too few; make at least {2 * len(samples)}."
    drift = [samples[n][i][1] - samples[n][j][1] for n, i, j in pairs]
    mean = sum(drift) / len(drift)
    if abs(mean) > 1:
        return (
            sentence(best_against_worst) + f" Yours: {mean:+.1f} tokens on average; stay within 1."
        )
    return None


def ranked(answers):
    return sorted(range(len(answers)), key=lambda i: -answers[i][0])


def best_against_worst(samples, gap):
    """Your chosen answers differ in length from the rejected ones: that is what a model would learn
    first."""
    pairs = []
    for n, answers in enumerate(samples):
        order = ranked(answers)
        both = [(n, order[0], order[-1]), (n, order[1], order[-2]), (n, order[0], order[-2])]
        pairs += [p for p in both if answers[p[1]][0] - answers[p[2]][0] >= gap]
    return pairs


def every_pair(samples, gap):
    """You take every pair there is, and with them the judge's love of length."""
    return [
        (n, i, j)
        for n, answers in enumerate(samples)
        for i in range(len(answers))
        for j in range(len(answers))
        if answers[i][0] - answers[j][0] >= gap
    ]


def ties_included(samples, gap):
    """Some of your pairs are hardly a preference: the scores are too close, or equal."""
    pairs = []
    for n, answers in enumerate(samples):
        order = ranked(answers)
        pairs += [(n, i, j) for i, j in zip(order, order[1:])]
    return pairs


def worst_first(samples, gap):
    """Your chosen answers are the worse ones."""
    return [(n, j, i) for n, i, j in make_pairs(samples, gap)]


def one_for_each_prompt(samples, gap):
    """One pair per prompt wastes most of what was sampled."""
    seen: dict[int, tuple] = {}
    for pair in make_pairs(samples, gap):
        seen.setdefault(pair[0], pair)
    return list(seen.values())


MAKE_PAIRS = Exercise(
    solution=make_pairs,
    cases=make_pairs_cases,
    run=lambda function, samples, gap: function(samples, gap),
    judge=judge_make_pairs,
    title="Which pairs? (open-ended)",
    difficulty=4,
    importance=4,
    minutes=30,
    statement="""
Preferences are often made by sampling several answers to a prompt and scoring them, with people or with
a reward model. Judges like long answers. Pair the best with the worst, and "longer" is the easiest thing
to learn from your data; DPO will learn it, since nothing in its loss knows what you meant.

Here are 8 scored answers to each of 60 prompts. Choose pairs that are clear (scores at least `gap` apart),
plenty (two per prompt on average), never repeated, and **fair in length**: on average the chosen answer is
as long as the rejected one. Never pair answers to different prompts.

Then ask more of yourself: is it enough if the *average* is fair? Plot score gap against difference in
length for the pairs of several methods.
""",
    hints=[
        "First list what is allowed at all. Then choose among it, with an eye on what was chosen before.",
        "Keep a running sum of (length chosen - length rejected), and take the pair that brings it "
        "nearest to zero.",
    ],
    mistakes=[best_against_worst, every_pair, ties_included, worst_first, one_for_each_prompt],
    discussion="Other remedies act on the loss: a penalty for length inside the margin (arXiv 2403.19159), "
    "or means instead of sums and no reference at all (SimPO, arXiv 2405.14734). Fair data costs least.",
)  # fmt: skip

EXERCISES = [SEQUENCE_LOGPS, OPTIMAL_POLICY, DPO_LOSS, STORED_REFERENCE, MAKE_PAIRS]
