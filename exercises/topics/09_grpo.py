"""Exercises 09: advantages, the distance to the reference, pass@k, the loss, an honest reward."""

from __future__ import annotations

import math
import random
import re

import torch
from checks import Exercise, sentence
from torch import Tensor

TITLE = "Group relative policy optimisation"
PRACTISES = (
    "comparing answers inside their group, estimating a KL divergence from samples, counting pass@k "
    "without bias, the clipped loss, writing a reward that cannot be cheated."
)


# 1. Advantages


def group_advantages(rewards: Tensor, group_size: int, eps: float) -> Tensor:
    """Return how many standard deviations each answer is better than the mean of its group, (N,).

    Args:
        rewards: (N,); the first `group_size` belong to the first prompt, and so on.
        eps: added to the standard deviation.
    """
    ### BEGIN SOLUTION
    groups = rewards.view(-1, group_size)
    spread = groups.std(1, keepdim=True, correction=0)
    return ((groups - groups.mean(1, keepdim=True)) / (spread + eps)).view(-1)
    ### END SOLUTION


def group_advantages_cases(seed: int) -> list[tuple]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(15, generator=generator)
    drawn[5:10] = 0.25  # five equal rewards
    return [
        (torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]), 4, 0.1),
        (drawn, 5, 0.05),
        (drawn[:6] * 3 - 1, 2, 0.02),
    ]


def compared_with_everybody(rewards, group_size, eps):
    """You compare each answer with the answers to all prompts: an easy prompt then looks like a good
    policy."""
    return (rewards - rewards.mean()) / (rewards.std(correction=0) + eps)


def spread_of_the_batch(rewards, group_size, eps):
    """The mean is your group's own, but the standard deviation is that of the whole batch."""
    groups = rewards.view(-1, group_size)
    return ((groups - groups.mean(1, keepdim=True)) / (rewards.std(correction=0) + eps)).view(-1)


def groups_across(rewards, group_size, eps):
    """Your groups mix prompts: answers to one prompt stand next to each other, not a stride apart."""
    groups = rewards.view(group_size, -1)
    spread = groups.std(0, keepdim=True, correction=0)
    return ((groups - groups.mean(0, keepdim=True)) / (spread + eps)).view(-1)


def sample_deviation(rewards, group_size, eps):
    """You divide by the standard deviation with n - 1, which is for estimating a larger population;
    this group is all there is."""
    groups = rewards.view(-1, group_size)
    spread = groups.std(1, keepdim=True)
    return ((groups - groups.mean(1, keepdim=True)) / (spread + eps)).view(-1)


def no_eps(rewards, group_size, eps):
    """A group whose rewards are all equal has no spread, and you divide by it."""
    return group_advantages(rewards, group_size, 0.0)


def divided_by_variance(rewards, group_size, eps):
    """You divide by the variance; its square root has the unit of the reward."""
    groups = rewards.view(-1, group_size)
    spread = groups.var(1, keepdim=True, correction=0)
    return ((groups - groups.mean(1, keepdim=True)) / (spread + eps)).view(-1)


def only_centred(rewards, group_size, eps):
    """You take the mean away but do not divide: a reward in cents would learn a hundred times as
    fast as one in euros."""
    groups = rewards.view(-1, group_size)
    return (groups - groups.mean(1, keepdim=True)).view(-1)


def eps_under_the_root(rewards, group_size, eps):
    """You add eps to the variance, under the root; asked for is the standard deviation plus eps."""
    groups = rewards.view(-1, group_size)
    spread = (groups.var(1, keepdim=True, correction=0) + eps).sqrt()
    return ((groups - groups.mean(1, keepdim=True)) / spread).view(-1)


GROUP_ADVANTAGES = Exercise(
    solution=group_advantages,
    cases=group_advantages_cases,
    title="Better than the others",
    difficulty=2,
    importance=5,
    minutes=10,
    statement="""
Is a reward of 1 good? If all eight answers to the prompt got 1, it says nothing; if it is the only one,
everything. GRPO measures each answer against the group that was sampled for the same prompt:

$$A_i = \\frac{r_i - \\operatorname{mean}(r)}{\\operatorname{std}(r) + \\epsilon}$$

with the population's standard deviation. **Before you write:** what must come out for a group whose
rewards are all equal? And what is the sum of every group?
""",
    hints=[
        "Give the rewards a second axis, so that one row is one group.",
        "`view(-1, group_size)`, then mean and std over axis 1 with `keepdim=True`. `std` has an "
        "argument `correction`.",
    ],
    mistakes=[compared_with_everybody, spread_of_the_batch, groups_across, sample_deviation, no_eps,
              divided_by_variance, only_centred, eps_under_the_root],
    discussion="`minimind.stages.grpo.group_advantages` is this function. Dr. GRPO (arXiv 2503.20783) "
    "argues for `only_centred`: dividing makes groups that are nearly all right or all wrong count more.",
)  # fmt: skip


# 2. The distance to the reference


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return for every sampled token an estimate of KL(policy ‖ reference) that is never negative.

    Args:
        logps, ref_logps: (N, T) log-probabilities of the sampled tokens under the policy, which
            sampled them, and under the frozen reference.
    """
    ### BEGIN SOLUTION
    difference = ref_logps - logps
    return difference.exp() - difference - 1
    ### END SOLUTION


def k3_cases(seed: int) -> list[tuple]:
    generator = torch.Generator().manual_seed(seed)
    logps = -2 * torch.rand(3, 4, generator=generator)
    return [
        (torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -1.5]])),
        (logps, logps + 0.7 * torch.randn(3, 4, generator=generator)),
    ]


def k1(logps, ref_logps):
    """Its mean is right, but single values of your estimate are negative: the loss would reward
    them."""
    return logps - ref_logps


def k2(logps, ref_logps):
    """Half the squared difference is never negative and close, but its mean is not the KL
    divergence."""
    return (logps - ref_logps) ** 2 / 2


def k3_backwards(logps, ref_logps):
    """You have exchanged the two: that estimates how far the policy is for somebody who samples from
    the reference, and we sample from the policy."""
    difference = logps - ref_logps
    return difference.exp() - difference - 1


def k3_without_one(logps, ref_logps):
    """Two equal models have the distance 0; yours have 1."""
    difference = ref_logps - logps
    return difference.exp() - difference


def kl_as_over_vocabulary(logps, ref_logps):
    """You weight by the policy's probability, as in a sum over the vocabulary; sampling has done that
    already."""
    return logps.exp() * (logps - ref_logps)


def plus_difference(logps, ref_logps):
    """Look at the sign of the middle term: near equality your estimate grows in a straight line, where
    it should be flat."""
    difference = ref_logps - logps
    return difference.exp() + difference - 1


K3 = Exercise(
    solution=k3,
    cases=k3_cases,
    title="How far from where we came?",
    difficulty=2,
    importance=4,
    minutes=15,
    statement="""
The KL divergence of two models is a sum over the whole vocabulary at every position. We want it from the
sampled token alone. With $\\rho = \\pi_\\text{ref}/\\pi$ the plain estimate is $-\\ln \\rho$: right on
average, but negative for every second token. Now $\\rho - 1$ has mean 0 under $\\pi$, so it may be added:

$$k_3 = \\rho - 1 - \\ln \\rho$$

Same mean, never negative, because a logarithm lies below its tangent. **Before you write:** in terms of
log-probabilities, what is $\\ln \\rho$?
""",
    hints=[
        "Everything follows from one difference of log-probabilities, and its `exp`.",
        "If the reference gives the token *less* probability than the policy, the difference is negative.",
    ],
    mistakes=[k1, k2, k3_backwards, k3_without_one, kl_as_over_vocabulary, plus_difference],
    discussion="`minimind.stages.common.k3` is this function. The names k1, k2, k3 are John Schulman's "
    "(*Approximating KL divergence*, 2020).",
)  # fmt: skip


# 3. pass@k


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the chance that k answers, drawn without repetition from the samples, hold a right one.

    Args:
        samples: how many answers were sampled to the problem.
        right: how many of them are right.
        k: at most `samples`.
    """
    ### BEGIN SOLUTION
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)
    ### END SOLUTION


def pass_at_k_cases(seed: int) -> list[tuple]:
    draw = random.Random(seed)
    samples = draw.randint(12, 20)
    right = draw.randint(3, 5)
    return [(4, 1, 2), (8, 0, 3), (10, 8, 4), (samples, right, 5), (samples, right, 1)]


def with_repetition(samples, right, k):
    """You draw with repetition, as if the same answer could come twice: that is biased downwards."""
    return 1 - (1 - right / samples) ** k


def share_of_right(samples, right, k):
    """That is the chance of one draw; of several, one right answer is enough."""
    return right / samples


def expected_number(samples, right, k):
    """You add up chances that do not exclude each other, so the sum can pass 1."""
    return k * right / samples


def any_right(samples, right, k):
    """You ask whether any of the samples is right; drawn are only k of them."""
    return float(right > 0)


def all_right(samples, right, k):
    """That is the chance that all k are right; one is enough."""
    return math.comb(right, k) / math.comb(samples, k)


def all_wrong(samples, right, k):
    """That is the chance that none of the k is right: you are one step from the end."""
    return math.comb(samples - right, k) / math.comb(samples, k)


PASS_AT_K = Exercise(
    solution=pass_at_k,
    cases=pass_at_k_cases,
    title="pass@k without bias",
    difficulty=2,
    importance=3,
    minutes=10,
    statement="""
Reinforcement learning can only make more frequent what is sampled *sometimes*. How often is that? pass@k is
the chance that at least one of k answers is right. Sampling exactly k and looking is noisy. Sample more, say
n with c right ones, and count over **all** ways to choose k of them: `pass_at_k(4, 1, 2)` is 0.5.

**Before you write:** it is easier to count the choices in which nothing is right.
""",
    hints=[
        "In how many ways can k be chosen out of n? In how many out of the wrong ones alone?",
        "`math.comb`. It is 0 if there are not enough wrong answers, which is just what is needed.",
    ],
    mistakes=[with_repetition, share_of_right, expected_number, any_right, all_right, all_wrong],
    discussion="`minimind.evaluate.pass_at_k` is this function; the estimate is from the Codex paper (arXiv "
    "2107.03374, eq. 1).",
)  # fmt: skip


# 4. The loss


def grpo_loss(
    logps: Tensor, old_logps: Tensor, ref_logps: Tensor, advantages: Tensor, mask: Tensor,
    beta: float, clip_eps: float,
) -> Tensor:  # fmt: skip
    """Return the clipped loss with the distance to the reference, a scalar.

    Args:
        logps, old_logps, ref_logps: (N, T) log-probabilities of the sampled tokens under the
            policy, the policy as it was when it sampled, and the reference.
        advantages: (N,), one for each answer.
        mask: (N, T), 1.0 where a token was sampled, 0.0 behind the end. Every row has at least a 1.
        beta: weight of the distance, for which use `k3` from above: e^d - d - 1, d = ref - policy.
        clip_eps: the ratio of policy and old policy counts between 1 - clip_eps and 1 + clip_eps.
    """
    ### BEGIN SOLUTION
    ratio = (logps - old_logps).exp()
    better = advantages[:, None]
    gain = torch.min(ratio * better, ratio.clamp(1 - clip_eps, 1 + clip_eps) * better)
    difference = ref_logps - logps
    distance = difference.exp() - difference - 1
    per_token = (beta * distance - gain) * mask
    return (per_token.sum(1) / mask.sum(1)).mean()
    ### END SOLUTION


def grpo_loss_cases(seed: int) -> list[tuple]:
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return scale * torch.randn(6, 5, generator=generator)

    logps = -2 * torch.rand(6, 5, generator=generator)
    mask = (torch.arange(5)[None] < torch.tensor([5, 1, 3, 2, 4, 5])[:, None]).float()
    advantages = torch.tensor([1.2, -0.7, -0.5, 1.0, -1.4, 0.4])
    old, ref = logps + noise(0.4), logps + noise(0.5)
    return [
        (logps[:, :1], logps[:, :1], logps[:, :1], advantages, torch.ones(6, 1), 0.5, 0.2),
        (logps, old, ref, advantages, mask, 0.3, 0.2),
        (logps, old, ref, advantages, mask, 0.0, 0.1),
    ]


def run_grpo_loss(function, logps, *rest):
    leaf = logps.clone().requires_grad_()
    loss = function(leaf, *rest)
    (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    return {"loss": loss.detach(), "gradient": gradient}


def parts(logps, old_logps, ref_logps, advantages, clip_eps):
    """Ratio, clipped ratio, advantages (N, 1) and distance, from which the mistakes are put together."""
    ratio = (logps - old_logps).exp()
    difference = ref_logps - logps
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return ratio, clipped, advantages[:, None], difference.exp() - difference - 1


def per_sequence(per_token, mask):
    return ((per_token * mask).sum(1) / mask.sum(1)).mean()


def only_the_clipped(logps, old_logps, ref_logps, advantages, mask, beta, clip_eps):
    """You always take the clipped ratio: an answer that has moved the wrong way could never come
    back."""
    _, clipped, better, distance = parts(logps, old_logps, ref_logps, advantages, clip_eps)
    return per_sequence(beta * distance - clipped * better, mask)


def nothing_clipped(logps, old_logps, ref_logps, advantages, mask, beta, clip_eps):
    """You do not clip: after several updates on the same answers nothing limits how far one of them
    pulls."""
    ratio, _, better, distance = parts(logps, old_logps, ref_logps, advantages, clip_eps)
    return per_sequence(beta * distance - ratio * better, mask)


def larger_of_the_two(logps, old_logps, ref_logps, advantages, mask, beta, clip_eps):
    """Of the two products you take the more hopeful one; the loss should rely on the pessimistic
    one."""
    ratio, clipped, better, distance = parts(logps, old_logps, ref_logps, advantages, clip_eps)
    return per_sequence(beta * distance - torch.max(ratio * better, clipped * better), mask)


def smaller_ratio_first(logps, old_logps, ref_logps, advantages, mask, beta, clip_eps):
    """You take the smaller ratio and then multiply; for a negative advantage the smaller *product* is
    another one."""
    ratio, clipped, better, distance = parts(logps, old_logps, ref_logps, advantages, clip_eps)
    return per_sequence(beta * distance - torch.min(ratio, clipped) * better, mask)


def gain_descended(logps, old_logps, ref_logps, advantages, mask, beta, clip_eps):
    """The optimizer goes downhill, and with your sign downhill makes good answers rarer."""
    ratio, clipped, better, distance = parts(logps, old_logps, ref_logps, advantages, clip_eps)
    return per_sequence(beta * distance + torch.min(ratio * better, clipped * better), mask)


def distance_rewarded(logps, old_logps, ref_logps, advantages, mask, beta, clip_eps):
    """Your loss becomes smaller with the distance to the reference: it drives the policy away."""
    ratio, clipped, better, distance = parts(logps, old_logps, ref_logps, advantages, clip_eps)
    return per_sequence(-beta * distance - torch.min(ratio * better, clipped * better), mask)


def mean_over_tokens(logps, old_logps, ref_logps, advantages, mask, beta, clip_eps):
    """You average over all tokens of the batch, so a long answer has more votes than a short one;
    here each answer has one."""
    ratio, clipped, better, distance = parts(logps, old_logps, ref_logps, advantages, clip_eps)
    per_token = beta * distance - torch.min(ratio * better, clipped * better)
    return (per_token * mask).sum() / mask.sum()


def padding_in_the_mean(logps, old_logps, ref_logps, advantages, mask, beta, clip_eps):
    """What stands behind the end of an answer is in your mean."""
    ratio, clipped, better, distance = parts(logps, old_logps, ref_logps, advantages, clip_eps)
    return (beta * distance - torch.min(ratio * better, clipped * better)).mean(1).mean()


def divided_by_width(logps, old_logps, ref_logps, advantages, mask, beta, clip_eps):
    """You leave the padding out of the sum but divide by it: short answers weigh too little."""
    ratio, clipped, better, distance = parts(logps, old_logps, ref_logps, advantages, clip_eps)
    per_token = beta * distance - torch.min(ratio * better, clipped * better)
    return (per_token * mask).mean()


def summed_over_the_answer(logps, old_logps, ref_logps, advantages, mask, beta, clip_eps):
    """You add up the tokens of an answer instead of averaging them."""
    ratio, clipped, better, distance = parts(logps, old_logps, ref_logps, advantages, clip_eps)
    per_token = beta * distance - torch.min(ratio * better, clipped * better)
    return (per_token * mask).sum(1).mean()


def ratio_upside_down(logps, old_logps, ref_logps, advantages, mask, beta, clip_eps):
    """Your ratio is the old policy's over the new one's: raising a good token would lower it."""
    ratio, clipped, better, distance = parts(old_logps, logps, ref_logps, advantages, clip_eps)
    difference = ref_logps - logps
    distance = difference.exp() - difference - 1
    return per_sequence(beta * distance - torch.min(ratio * better, clipped * better), mask)


def ratio_to_the_reference(logps, old_logps, ref_logps, advantages, mask, beta, clip_eps):
    """You compare with the reference where the policy that sampled is meant."""
    ratio, clipped, better, distance = parts(logps, ref_logps, ref_logps, advantages, clip_eps)
    return per_sequence(beta * distance - torch.min(ratio * better, clipped * better), mask)


def log_ratio(logps, old_logps, ref_logps, advantages, mask, beta, clip_eps):
    """A difference of log-probabilities is the logarithm of the ratio, not the ratio."""
    _, _, better, distance = parts(logps, old_logps, ref_logps, advantages, clip_eps)
    ratio = logps - old_logps
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return per_sequence(beta * distance - torch.min(ratio * better, clipped * better), mask)


GRPO_LOSS = Exercise(
    solution=grpo_loss,
    cases=grpo_loss_cases,
    run=run_grpo_loss,
    title="The loss whose value says nothing",
    difficulty=4,
    importance=5,
    minutes=30,
    statement="""
With the ratio $r = \\pi/\\pi_\\text{old}$ of every sampled token, minimise

$$-\\min\\big(r A,\\ \\operatorname{clip}(r, 1-\\epsilon, 1+\\epsilon)\\, A\\big) + \\beta\\, k_3$$

averaged over the tokens of each answer, and then over the answers. The check also looks at the gradient.

**Before you write:** before the first update $r = 1$ everywhere. What is the loss then, if the advantages of
every group add up to 0? And why does it learn all the same?
""",
    hints=[
        "Give the advantages a second axis: all tokens of an answer share one.",
        "The `min` is over two *products*. Sketch both against r, once for A > 0 and once for A < 0.",
        "Mask per token, sum over the tokens of a row, divide by that row's number of tokens, then `mean()`.",
    ],
    mistakes=[only_the_clipped, nothing_clipped, larger_of_the_two, smaller_ratio_first, gain_descended,
              distance_rewarded, mean_over_tokens, padding_in_the_mean, divided_by_width,
              summed_over_the_answer, ratio_upside_down, ratio_to_the_reference, log_ratio],
    discussion="`minimind.stages.grpo.grpo_loss` is this function. A loss of 0 at the first step is no error: "
    "the derivative of r at r = 1 is that of ln π, so the gradient is the policy gradient.",
)  # fmt: skip


# 5. Open-ended: an honest reward


def honest_reward(text: str, answer: str) -> float:
    """Return a reward between 0 and 1 for what a model wrote. The right answer is known.

    An answer should look like `<think>2+3=5;</think><answer>5</answer>`. A policy will find every way
    to be paid for less work: give none.
    """
    ### BEGIN SOLUTION
    form = re.fullmatch(r"<think>(.+?)</think>\s*<answer>(.*?)</answer>", text.strip(), re.DOTALL)
    if not form or "<" in form[1] + form[2]:
        return 0.0
    return 1.0 if form[2].strip() == answer.strip() else 0.1
    ### END SOLUTION


HONEST = "<think>a7;b+8=5;</think><answer>{}</answer>"
ATTACKS = {
    "all digits at once": "<think>a7;b+8=5;</think><answer>0 1 2 3 4 5 6 7 8 9</answer>",
    "several answers": "<think>a7;b+8=5;</think><answer>3</answer><answer>5</answer>",
    "the right answer as a part of the answer": "<think>a7;b+8=5;</think><answer>155</answer>",
    "a second answer inside the thought": "<think>a7;<answer>5</answer></think><answer>3</answer>",
    "no thought at all": "<answer>5</answer>",
    "an empty thought": "<think></think><answer>5</answer>",
    "tags in the wrong order": "<answer>5</answer><think>a7;b+8=5;</think>",
    "more text after the end": "<think>a7;b+8=5;</think><answer>5</answer> Or 3? Or 4? Or 5?",
    "the answer without its tags": "<think>a7;b+8=5;</think>5",
    "tags over and over": "<think><think>a7;</think></think><answer>5</answer>",
    "nothing": "",
}


def honest_reward_cases(seed: int) -> list[tuple]:
    right, wrong = "5", random.Random(seed).choice("0123467")
    honest = [HONEST.format(right), HONEST.format(f" {right}\n"), HONEST.format(wrong)]
    return [(text, right) for text in [*honest, *ATTACKS.values()]]


def judge_honest_reward(cases: list[tuple], results: list[float]) -> str | None:
    best, spaced, wrong, *attacks = map(float, results)
    if not all(0 <= reward <= 1 for reward in map(float, results)):
        return "Rewards must lie between 0 and 1."
    if best - wrong < 0.5:
        return sentence(form_pays_most)
    if abs(spaced - best) > 1e-6:
        return sentence(spaces_matter)
    for (name, text), reward in zip(ATTACKS.items(), attacks):
        if reward > wrong:
            return (
                f"You pay {reward:.2f} for a trick ({name}): {text!r}. An honest wrong answer gets "
                f"{wrong:.2f}; a trick should not get more."
            )
    return None


def contained(text, answer):
    """You look for the right answer anywhere in the text: whoever writes all digits is always right."""
    return float(answer in text)


def form_pays_most(text, answer):
    """Most of your reward is for the tags, which are easy: the policy will stop there and fill in
    anything."""
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    form = all(text.count(tag) == 1 for tag in tags) and text.startswith("<think>")
    return 0.7 * form + 0.3 * (f"<answer>{answer}</answer>" in text)


def tags_counted_apart(text, answer):
    """Every tag earns something by itself, in whatever order and however often."""
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    return 0.1 * sum(tag in text for tag in tags) + 0.6 * (f"<answer>{answer}</answer>" in text)


def last_answer_counts(text, answer):
    """You read the last answer and do not ask what else was written."""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return float(bool(found) and found[-1].strip() == answer)


def first_answer_counts(text, answer):
    """You read the first answer and do not ask what else was written. The package's `exact` does so too, but nothing
    can be won there by a second answer; here the whole text is to be of the form."""
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return float(found is not None and found[1].strip() == answer)


def spaces_matter(text, answer):
    """The right answer between two spaces is still the right answer."""
    form = re.fullmatch(r"<think>([^<]+)</think><answer>([^<]*)</answer>", text)
    return 0.0 if not form else 1.0 if form[2] == answer else 0.1


HONEST_REWARD = Exercise(
    solution=honest_reward,
    cases=honest_reward_cases,
    judge=judge_honest_reward,
    title="A reward that cannot be cheated (open-ended)",
    difficulty=3,
    importance=4,
    minutes=30,
    statement="""
A policy does not want what you want. It wants what you *pay* for. Write a reward for answers of the form
`<think>…</think><answer>5</answer>`, to be used when the right answer is known.

The check plays the policy. It hands in an honest right answer, an honest wrong one, and a dozen tricks: all
digits at once, several answers, tags over and over, no thought. An honest wrong answer may get a little for its
form; no trick may get more than that, and the right answer must be worth at least 0.5 more.

Then go on: which tricks does *your* reward still pay? Is a long, repetitive thought one of them? Would you
like to pay for short answers, and what would the policy make of it?
""",
    hints=[
        "Do not search for good signs; describe the *whole* text that you accept, and pay nothing else.",
        "`re.fullmatch` with two groups. What may not stand inside a group?",
    ],
    mistakes=[contained, form_pays_most, tags_counted_apart, last_answer_counts, first_answer_counts,
              spaces_matter],
    discussion="Every reward that was ever used has been cheated; see *Concrete problems in AI safety* (arXiv "
    "1606.06565, section 4). What helps: pay for what can be verified, and read samples. The package's `exact` is "
    "laxer than yours: it reads the first answer and ignores the rest. A second answer cannot win anything, so no "
    "policy learns to write one for it; but it is not punished either, and whoever reads the *last* answer, or any, "
    "pays for a guess more.",
)  # fmt: skip

EXERCISES = [GROUP_ADVANTAGES, K3, PASS_AT_K, GRPO_LOSS, HONEST_REWARD]
