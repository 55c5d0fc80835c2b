"""Exercises 10: forgetting by KL, a Beta belief, advantages without a group, what to ask next."""

from __future__ import annotations

import random
from math import exp

import torch
from checks import Exercise, sentence
from torch import Tensor

TITLE = "Single-stream policy optimisation"
PRACTISES = (
    "forgetting as fast as the policy moves, a Beta belief about a reward, advantages when every "
    "prompt is answered once, drawing the problems whose outcome is open, predicting a reward that drifts."
)


def numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# 1. How much is kept


def kept_share(kl: float, half_life: float, lowest: float, highest: float) -> float:
    """Return which share of the old counts is kept after the policy has moved by `kl`.

    Args:
        kl: distance between the policy of the last update and the policy of now, nats per token.
        half_life: the distance after which half is forgotten.
        lowest, highest: limits of the share that is returned.
    """
    ### BEGIN SOLUTION
    return min(max(2 ** (-kl / half_life), lowest), highest)
    ### END SOLUTION


def kept_share_cases(seed: int) -> list[tuple]:
    drawn = random.Random(seed).uniform(0.01, 0.05)
    return [
        (0.06, 0.06, 0.1, 0.96),
        (0.03, 0.06, 0.5, 0.96),
        (0.0, 0.06, 0.5, 0.96),
        (0.4, 0.1, 0.3, 0.9),
        (drawn, 0.06, 0.2, 0.99),
        (0.15, 0.05, 0.1, 0.9),
    ]


def forgotten_instead(kl, half_life, lowest, highest):
    """You return the share that is *forgotten*: a policy that stands still would lose everything."""
    return min(max(1 - 2 ** (-kl / half_life), lowest), highest)


def grows(kl, half_life, lowest, highest):
    """Your share never falls below its upper limit. The further the policy has gone, the less its old
    rewards say."""
    return min(max(2 ** (kl / half_life), lowest), highest)


def to_the_base_e(kl, half_life, lowest, highest):
    """After one `half_life` yours keeps 1/e = 37%; the name promises a half."""
    return min(max(exp(-kl / half_life), lowest), highest)


def upside_down(kl, half_life, lowest, highest):
    """You divide the half-life by the distance; count in the other direction how many half-lives
    the policy has travelled."""
    return min(max(2 ** (-half_life / max(kl, 1e-9)), lowest), highest)


def no_limits(kl, half_life, lowest, highest):
    """You keep no limits: at distance 0 nothing would ever be forgotten."""
    return 2 ** (-kl / half_life)


def only_from_below(kl, half_life, lowest, highest):
    """The upper limit is missing: while the policy stands still the counts would grow without end, and
    a belief with a thousand counts cannot be moved any more."""
    return max(2 ** (-kl / half_life), lowest)


def only_from_above(kl, half_life, lowest, highest):
    """The lower limit is missing: after one large step everything that was known would be gone."""
    return min(2 ** (-kl / half_life), highest)


KEPT_SHARE = Exercise(
    solution=kept_share,
    cases=kept_share_cases,
    title="How much is still true?",
    difficulty=1,
    importance=3,
    minutes=8,
    statement="""
The tracker remembers what each prompt has earned. But it was an *older* policy that earned it. How old is not a
matter of time: a policy that has not moved is not old. So the share that is kept depends on the distance,

$$\\rho = \\operatorname{clip}\\big(2^{-D/D_\\text{half}},\\ \\rho_\\text{min},\\ \\rho_\\text{max}\\big)$$

**Before you write:** which share is kept at $D = 0$ with the limits 0.5 and 0.96? And how many answers does a
belief hold at most, when each is worth 1 and all shrink by 0.96 between two of them?
""",
    hints=["Write the power first and try it at D = 0 and at D = half_life.", "`min(max(…, low), high)`."],
    mistakes=[forgotten_instead, grows, to_the_base_e, upside_down, no_limits, only_from_below,
              only_from_above],
    discussion="At rest ρ = 0.96: the counts add up to 1 + 0.96 + 0.96² + … = 1/(1 - 0.96) = 25 answers. At the "
    "other limit, 0.5, it is 2. Those two numbers are the longest and the shortest memory of a prompt that is "
    "answered once between two updates; a key with n answers each time remembers n times as many.",
)  # fmt: skip


# 2. The belief


def counted(alpha: float, beta: float, rewards: list[float], rho: float) -> tuple[float, float]:
    """Return the belief Beta(α, β) about one prompt after new rewards.

    Args:
        alpha, beta: faded counts of successes and failures so far.
        rewards: what the new answers earned, each in [0, 1]. All come from one policy.
        rho: share of the old counts that is kept now.
    """
    ### BEGIN SOLUTION
    successes = sum(rewards)
    return rho * alpha + successes, rho * beta + len(rewards) - successes
    ### END SOLUTION


def counted_cases(seed: int) -> list[tuple]:
    draw = random.Random(seed)
    return [
        (1.0, 1.0, [1.0], 0.5),
        (6.0, 2.0, [0.0], 0.9),
        (3.0, 5.0, [1.0, 0.0, 1.0, 1.0], 0.8),
        (draw.uniform(1, 9), draw.uniform(1, 9), [draw.random() for _ in range(3)], 0.7),
    ]


def forgets_afterwards(alpha, beta, rewards, rho):
    """You let the new rewards fade too. They come from the policy of now; only what is older fades."""
    won = sum(rewards)
    return rho * (alpha + won), rho * (beta + len(rewards) - won)


def forgets_each_time(alpha, beta, rewards, rho):
    """You forget once for every reward, but the policy has moved once: the order of the answers in a
    batch would decide what they are worth."""
    for reward in rewards:
        alpha, beta = rho * alpha + reward, rho * beta + 1 - reward
    return alpha, beta


def failures_not_counted(alpha, beta, rewards, rho):
    """Nobody counts the failures: your belief can only rise."""
    return rho * alpha + sum(rewards), rho * beta


def failures_never_fade(alpha, beta, rewards, rho):
    """Successes fade and failures do not: your belief sinks all by itself."""
    return rho * alpha + sum(rewards), beta + len(rewards) - sum(rewards)


def nothing_fades(alpha, beta, rewards, rho):
    """You forget nothing, so the belief is that about a policy of long ago."""
    return alpha + sum(rewards), beta + len(rewards) - sum(rewards)


def mean_counted(alpha, beta, rewards, rho):
    """You count the mean as if it were one answer; four answers say more than one."""
    mean = sum(rewards) / len(rewards)
    return rho * alpha + mean, rho * beta + 1 - mean


def swapped_counts(alpha, beta, rewards, rho):
    """Your successes are added to the failures."""
    return rho * alpha + len(rewards) - sum(rewards), rho * beta + sum(rewards)


def moving_average(alpha, beta, rewards, rho):
    """You weight the new by 1 - ρ as in a moving average. Counts are not averaged: a new answer is
    always worth 1."""
    won = sum(rewards)
    return rho * alpha + (1 - rho) * won, rho * beta + (1 - rho) * (len(rewards) - won)


COUNTED = Exercise(
    solution=counted,
    cases=counted_cases,
    title="A belief that fades",
    difficulty=2,
    importance=4,
    minutes=12,
    statement="""
A reward between 0 and 1 is a success to that degree. The belief about a prompt is a Beta distribution: α counts
successes, β failures, and its mean $v = \\alpha/(\\alpha+\\beta)$ is the reward that is expected. With every
update the old counts shrink by ρ, and the new rewards are added.

Here several answers to one prompt (or to problems of one kind) arrive together.
""",
    hints=["A reward of 0.3 is three tenths of a success. And the other seven tenths?",
           "Three steps: let both counts fade, once; add the rewards to one; add what is missing to 1 to the other."],
    mistakes=[forgets_afterwards, forgets_each_time, failures_not_counted, failures_never_fade, nothing_fades,
              mean_counted, swapped_counts, moving_average],
    discussion="Seen from v it *is* a moving average: v moves towards the mean reward by the new answers' share of "
    "all counts. The Beta brings what an average has not: it knows how much it knows. A reward outside "
    "[0, 1] would make a count negative; the package refuses it.",
)  # fmt: skip


# 3. Advantages


def group_of_one(
    keys: list[str], rewards: Tensor, beliefs: dict[str, tuple[float, float]], rho: float
) -> tuple[Tensor, dict[str, tuple[float, float]]]:
    """Return the advantages of a batch in which every prompt was answered once, and the new beliefs.

    The advantage of an answer is its reward minus what was expected of its key, then normalised
    over the batch: minus the mean, divided by the population's standard deviation plus 1e-4.

    Args:
        keys: (N,) whose belief an answer belongs to; a key may occur several times.
        rewards: (N,) in [0, 1].
        beliefs: key to (α, β); a key that is missing is undecided, Beta(1, 1).
        rho: share of the old counts that a key keeps when it is updated.
    """

    ### BEGIN SOLUTION
    def expected(key):
        alpha, beta = beliefs.get(key, (1.0, 1.0))
        return alpha / (alpha + beta)

    surprise = rewards - torch.tensor([expected(key) for key in keys])
    advantages = (surprise - surprise.mean()) / (surprise.std(correction=0) + 1e-4)

    updated = dict(beliefs)
    for key in set(keys):
        alpha, beta = beliefs.get(key, (1.0, 1.0))
        mine = [float(reward) for k, reward in zip(keys, rewards) if k == key]
        updated[key] = (rho * alpha + sum(mine), rho * beta + len(mine) - sum(mine))
    return advantages, updated
    ### END SOLUTION


def group_of_one_cases(seed: int) -> list[tuple]:
    g, draw = numbers(seed), random.Random(seed)
    beliefs = {"easy": (9.0, 1.0), "hard": (1.0, 4.0), "away": (2.0, 3.0)}
    many = [draw.choice(["easy", "hard", "odd"]) for _ in range(6)] + ["easy", "hard", "odd"]
    return [
        (["easy", "hard"], torch.tensor([1.0, 1.0]), dict(beliefs), 0.8),
        (["hard", "easy", "new", "hard"], torch.tensor([0.0, 1.0, 1.0, 0.5]), dict(beliefs), 0.9),
        (many, torch.rand(9, generator=g), {**beliefs, "odd": (3.0, 1.5)}, 0.6),
    ]


def with_order_of_keys(function, keys, rewards, beliefs, rho):
    """The order of a dict's entries is no mistake."""
    advantages, updated = function(keys, rewards, beliefs, rho)
    return {"advantages": advantages, "beliefs": dict(sorted(updated.items()))}


def mean_of(beliefs, keys, unseen=(1.0, 1.0)):
    pairs = [beliefs.get(key, unseen) for key in keys]
    return torch.tensor([alpha / (alpha + beta) if alpha + beta else 0.0 for alpha, beta in pairs])


def new_beliefs(keys, rewards, beliefs, rho):
    return group_of_one(keys, rewards, beliefs, rho)[1]


def normalised(surprise):
    return (surprise - surprise.mean()) / (surprise.std(correction=0) + 1e-4)


def updated_first(keys, rewards, beliefs, rho):
    """Your baseline has already seen the rewards that it is to judge: it takes back a part of each, the
    greater part the less it knew before."""
    after = new_beliefs(keys, rewards, beliefs, rho)
    return normalised(rewards - mean_of(after, keys)), after


def one_after_the_other(keys, rewards, beliefs, rho):
    """You update after every single answer, so the second answer of a key is judged by the first: the
    order in the batch decides. All of them come from one policy; judge them together."""
    beliefs, surprise = dict(beliefs), []
    for key, reward in zip(keys, rewards.tolist()):
        alpha, beta = beliefs.get(key, (1.0, 1.0))
        surprise.append(reward - alpha / (alpha + beta))
        beliefs[key] = (rho * alpha + reward, rho * beta + 1 - reward)
    return normalised(torch.tensor(surprise)), beliefs


def forgets_per_answer(keys, rewards, beliefs, rho):
    """The advantages are right. But a key that occurs three times forgets three times in your update."""
    after = one_after_the_other(keys, rewards, beliefs, rho)[1]
    return normalised(rewards - mean_of(beliefs, keys)), after


def everybody_forgets(keys, rewards, beliefs, rho):
    """The advantages are right. But keys that are not in the batch fade too, though nothing was learnt
    about them."""
    after = new_beliefs(keys, rewards, beliefs, rho)
    for key in beliefs.keys() - set(keys):
        after[key] = (rho * beliefs[key][0], rho * beliefs[key][1])
    return normalised(rewards - mean_of(beliefs, keys)), after


def group_habit(keys, rewards, beliefs, rho):
    """You normalise inside each key, as with groups. A key with one answer then has no advantage at
    all: normalise over the whole batch."""
    surprise = rewards - mean_of(beliefs, keys)
    advantages = torch.zeros_like(surprise)
    for key in set(keys):
        mine = torch.tensor([k == key for k in keys])
        advantages[mine] = normalised(surprise[mine])
    return advantages, new_beliefs(keys, rewards, beliefs, rho)


def not_normalised(keys, rewards, beliefs, rho):
    """You return the surprise as it is; the step would be as small as the rewards are."""
    return rewards - mean_of(beliefs, keys), new_beliefs(keys, rewards, beliefs, rho)


def only_divided(keys, rewards, beliefs, rho):
    """You divide by the deviation and leave the mean: when the tracker lags behind, everything looks
    good, whatever was said."""
    surprise = rewards - mean_of(beliefs, keys)
    return surprise / (surprise.std(correction=0) + 1e-4), new_beliefs(keys, rewards, beliefs, rho)


def sample_deviation(keys, rewards, beliefs, rho):
    """You divide by the deviation of a sample (n - 1); asked for is the population's (n)."""
    surprise = rewards - mean_of(beliefs, keys)
    advantages = (surprise - surprise.mean()) / (surprise.std() + 1e-4)
    return advantages, new_beliefs(keys, rewards, beliefs, rho)


def no_baseline(keys, rewards, beliefs, rho):
    """You normalise the rewards and do not ask what was expected: every easy problem looks good and
    every hard one bad."""
    return normalised(rewards), new_beliefs(keys, rewards, beliefs, rho)


def unseen_is_hopeless(keys, rewards, beliefs, rho):
    """You expect 0 of a key that was never seen. Nothing is known of it; expect a half."""
    after = new_beliefs(keys, rewards, beliefs, rho)
    return normalised(rewards - mean_of(beliefs, keys, unseen=(0.0, 0.0))), after


def sign_turned(keys, rewards, beliefs, rho):
    """You subtract the reward from the expectation: what was better than expected would be unlearnt."""
    return normalised(mean_of(beliefs, keys) - rewards), new_beliefs(keys, rewards, beliefs, rho)


GROUP_OF_ONE = Exercise(
    solution=group_of_one,
    cases=group_of_one_cases,
    run=with_order_of_keys,
    title="A group of one",
    difficulty=3,
    importance=5,
    minutes=25,
    statement="""
Now one step of SPO without the model: a batch comes in, every prompt answered once; the advantages go out, and the
beliefs are brought up to date. All answers were sampled from the *same* policy.

**Before you write:** the line that asks the beliefs and the line that updates them stand next to each other. Does
it matter which comes first? Take a key that was never seen, with ρ = 0.5 and reward 1, and work out the surprise
both ways.
""",
    hints=[
        "First everything that is asked of the old beliefs, for the whole batch; then the update.",
        "`dict.get(key, (1.0, 1.0))`. And `set(keys)` gives every key once.",
        "The normalisation is that of GRPO, with the batch as the one group.",
    ],
    mistakes=[updated_first, one_after_the_other, forgets_per_answer, everybody_forgets, group_habit,
              not_normalised, only_divided, sample_deviation, no_baseline, unseen_is_hopeless, sign_turned],
    discussion="Beta(1, 1), ρ = 0.5, reward 1: the surprise is 1 - 1/2 = 0.5 if you ask first, and 1 - 1.5/2 = 0.25 if "
    "you update first. A baseline may know everything but the answer that it judges: only then is its share of "
    "the gradient zero on average. In the package: `ValueTracker` and `spo_advantages`.",
)  # fmt: skip


# 4. What to ask


def asked_how_often(values: Tensor, epsilon: float) -> Tensor:
    """Return the probabilities (N,) with which the problems are drawn, in proportion to √(v(1-v)) + ε.

    Args:
        values: (N,) expected reward v of every problem, in [0, 1].
        epsilon: what every problem has at least, before all is scaled to 1.
    """
    ### BEGIN SOLUTION
    weights = (values * (1 - values)).sqrt() + epsilon
    return weights / weights.sum()
    ### END SOLUTION


def asked_how_often_cases(seed: int) -> list[tuple]:
    g = numbers(seed)
    return [
        (torch.tensor([0.0, 0.5, 1.0]), 0.05),
        (torch.tensor([0.9, 0.1, 0.2, 0.5]), 0.1),
        (torch.rand(7, generator=g), 0.02),
        (torch.zeros(3), 0.05),
    ]


def scaled(weights):
    return weights / weights.sum()


def variance_not_deviation(values, epsilon):
    """You weight by the variance; asked for is the standard deviation, which is less severe with nearly
    solved problems."""
    return scaled(values * (1 - values) + epsilon)


def hardest_first(values, epsilon):
    """You draw what fails most. Where nothing ever succeeds there is nothing to learn from either."""
    return scaled(1 - values + epsilon)


def easiest_first(values, epsilon):
    """You draw most what already works; there is little left to learn from it."""
    return scaled(values + epsilon)


def epsilon_under_the_root(values, epsilon):
    """Your ε stands under the root, where 0.05 becomes 0.22."""
    return scaled((values * (1 - values) + epsilon).sqrt())


def epsilon_after_scaling(values, epsilon):
    """You add ε after scaling: the sum is no longer 1."""
    deviation = (values * (1 - values)).sqrt()
    return deviation / deviation.sum().clamp(min=1e-12) + epsilon


def not_scaled(values, epsilon):
    """These are weights, not probabilities: they do not add up to 1."""
    return (values * (1 - values)).sqrt() + epsilon


def through_softmax(values, epsilon):
    """A softmax makes nearly equal what differs little: a solved problem would be drawn more than half
    as often as an open one."""
    return ((values * (1 - values)).sqrt() + epsilon).softmax(0)


def solved_is_gone(values, epsilon):
    """Without ε a solved problem is never drawn again, and nobody notices when it is forgotten. And
    if all are solved you divide 0 by 0."""
    return scaled((values * (1 - values)).sqrt())


ASKED_HOW_OFTEN = Exercise(
    solution=asked_how_often,
    cases=asked_how_often_cases,
    title="What to ask next",
    difficulty=2,
    importance=3,
    minutes=10,
    statement="""
A problem that is always solved teaches nothing, nor does one that never is: the surprise is 0 either way. A reward
that is 1 with probability v has the standard deviation $\\sqrt{v(1-v)}$: that much surprise is to be had. SPO
draws its problems in proportion to $\\sqrt{v(1-v)} + \\epsilon$.

**Before you write:** how much more often than a solved problem is one with v = 1/2 drawn, at ε = 0.05?
""",
    hints=["Work out the three weights of the first case by hand.", "ε is added to the deviation, then all are divided by the sum."],
    mistakes=[variance_not_deviation, hardest_first, easiest_first, epsilon_under_the_root, epsilon_after_scaling,
              not_scaled, through_softmax, solved_is_gone],
    discussion="Eleven times: 0.55 against 0.05. The ε is small insurance with a large effect: without it the easy "
    "problems leave the pool, and what leaves the pool is forgotten (lesson 09 shows by how much).",
)  # fmt: skip


# 5. Open-ended: a reward that drifts


def predicted_rewards(rewards: list[float], moved: list[float]) -> list[float]:
    """Predict each reward of one stream from those before it.

    Args:
        rewards: 0.0 or 1.0 each; reward t was earned by the policy of step t.
        moved: KL between the policies of step t-1 and t, nats per token; the first is 0.

    Returns:
        one prediction in [0, 1] for each reward. Prediction t may use `moved[: t + 1]` and
        `rewards[:t]`, never `rewards[t]`.
    """
    ### BEGIN SOLUTION
    predictions, alpha, beta = [], 1.0, 1.0
    for reward, kl in zip(rewards, moved):
        kept = 2 ** (-kl / 0.06)
        alpha, beta = 1 + kept * (alpha - 1), 1 + kept * (beta - 1)  # back towards undecided
        predictions.append(alpha / (alpha + beta))
        alpha, beta = alpha + reward, beta + 1 - reward
    return predictions
    ### END SOLUTION


def predicted_rewards_cases(seed: int) -> list[tuple]:
    """A policy that stands still, one that jumps, one that drifts; the second again with another end."""
    draw, steps = random.Random(seed), 4000
    still = ([float(draw.random() < 0.7) for _ in range(steps)], [0.0] * steps)
    jumps, far, v = [], [], 0.5
    for t in range(steps):
        if t % 200 == 0:
            v = draw.choice([0.1, 0.3, 0.9] if v == 0.5 else [x for x in (0.1, 0.5, 0.9) if x != v])
        far.append(0.5 if t % 200 == 0 and t else 0.0)
        jumps.append(float(draw.random() < v))
    walk, v = [], 0.5
    for _ in range(steps):
        v = min(max(v + draw.gauss(0, 0.03), 0.02), 0.98)
        walk.append(float(draw.random() < v))
    turned = [*jumps[:-1], 1 - jumps[-1]]
    return [still, (jumps, far), (walk, [0.0] + [0.006] * (steps - 1)), (turned, far)]


SITUATIONS = (
    "while the policy stands still",
    "when it jumps now and then",
    "when it drifts all the time",
)
ALLOWED = 0.006


def judge_predictions(cases: list[tuple], results: list[list[float]]) -> str | None:
    for (rewards, _), mine in zip(cases, results):
        if len(mine) != len(rewards):
            return f"There are {len(rewards)} rewards and you return {len(mine)} predictions."
        if not all(0 <= prediction <= 1 for prediction in mine):
            return "A prediction of yours lies outside 0 to 1."
    if results[1] != results[3]:
        return sentence(knows_it_already)

    def error(rewards, predictions):
        return sum((r - p) ** 2 for r, p in zip(rewards, predictions)) / len(rewards)

    for name, (rewards, moved), mine in zip(SITUATIONS, cases, results):
        best, yours = error(rewards, predicted_rewards(rewards, moved)), error(rewards, mine)
        if yours > best + ALLOWED:
            return (
                f"Your mean squared error {name} is {yours:.4f}. {best:.4f} can be reached; up to "
                f"{best + ALLOWED:.4f} is accepted."
            )
    return None


def faded(rewards, moved, share):
    predictions, alpha, beta = [], 1.0, 1.0
    for reward, kl in zip(rewards, moved):
        alpha, beta = share(kl) * alpha, share(kl) * beta
        predictions.append(alpha / (alpha + beta) if alpha + beta > 1e-9 else 0.5)
        alpha, beta = alpha + reward, beta + 1 - reward
    return predictions


def knows_it_already(rewards, moved):
    """Your prediction depends on the reward that it predicts. In training that would be a baseline that
    takes back what the answer has earned."""
    after = faded(rewards, moved, lambda kl: 2 ** (-kl / 0.06))[1:]
    return [*after, after[-1] * 0.9 + 0.1 * rewards[-1]]


def never_forgets(rewards, moved):
    """You average over everything that ever was, also over policies that are long gone."""
    return faded(rewards, moved, lambda kl: 1.0)


def by_the_clock(rewards, moved):
    """You forget at a constant pace. While the policy stands still that throws away what is still true,
    and after a jump it is too slow: look at how far it moved."""
    return faded(rewards, moved, lambda kl: 0.9)


def like_last_time(rewards, moved):
    """You expect what came last. One answer is mostly chance."""
    return [0.5, *rewards[:-1]]


def always_a_half(rewards, moved):
    """You never learn: a half is all you expect."""
    return [0.5] * len(rewards)


def the_wrong_way(rewards, moved):
    """You keep everything when the policy jumps and forget when it stands still."""
    return faded(rewards, moved, lambda kl: 1 - 2 ** (-(kl + 0.002) / 0.06))


PREDICTED_REWARDS = Exercise(
    solution=predicted_rewards,
    cases=predicted_rewards_cases,
    judge=judge_predictions,
    title="Predict a reward that drifts (open-ended)",
    difficulty=4,
    importance=3,
    minutes=30,
    statement="""
A good baseline predicts the reward. Here are three streams of 4,000 rewards: of a policy that stands still, of one
that jumps every 200 steps, and of one that drifts. You are told how far it moves, not how good it is. Predict
every reward from the ones before it.

The check takes your mean squared error in each of the three (the noise of the rewards themselves, most of the
error, cannot be predicted), and hands in one stream twice with another end, to see whether you peek.

Then go on: what is the best half-life for each stream? What would you do if nobody told you the KL? And a prompt
of which you have seen three answers, among others of which you have seen thousands: could it borrow from them?
""",
    hints=[
        "Keep two counts; before each prediction let them fade by what `moved` says.",
        "After a jump very little is known. A belief that fades towards 0/0 then believes the next answer "
        "blindly; let it fade towards the undecided Beta(1, 1) instead.",
    ],
    mistakes=[knows_it_already, never_forgets, by_the_clock, like_last_time, always_a_half, the_wrong_way],
    discussion="The package lets the counts themselves fade and never below half (ρ_min = 0.5), which serves the same end. "
    "Borrowing between prompts is what its key does: problems of one length share a belief.",
)  # fmt: skip

EXERCISES = [KEPT_SHARE, COUNTED, GROUP_OF_ONE, ASKED_HOW_OFTEN, PREDICTED_REWARDS]
