"""GRPO: its two formulas against slow ones written out, the rollouts, and the run as a whole."""

import math

import pytest
import torch

from minimind import UserError
from minimind.stages.common import k3
from minimind.stages.grpo import group_advantages, grpo_loss

EPS = 0.2


def by_hand(logps, old, ref, advantages, mask, beta, policy_loss="clip"):
    """The loss token by token, in plain numbers."""
    logps = logps.detach()
    sequences = []
    for i in range(len(logps)):
        terms = []
        for t in range(logps.shape[1]):
            if not mask[i, t]:
                continue
            r, a = math.exp(logps[i, t] - old[i, t]), float(advantages[i])
            gain = min(r * a, max(min(r, 1 + EPS), 1 - EPS) * a)
            if policy_loss == "cispo":
                gain = min(r, 1 + EPS) * a * float(logps[i, t])
            d = float(ref[i, t] - logps[i, t])
            terms.append(-gain + beta * (math.exp(d) - d - 1))
        sequences.append(sum(terms) / len(terms))
    return sum(sequences) / len(sequences)


@pytest.fixture
def sampled():
    """Six answers of unequal length to two prompts; ratios on both sides of the clip."""
    generator = torch.Generator().manual_seed(3)
    logps = -2 * torch.rand(6, 7, generator=generator, dtype=torch.double)
    old = logps + 0.4 * torch.randn(6, 7, generator=generator, dtype=torch.double)
    ref = logps + 0.3 * torch.randn(6, 7, generator=generator, dtype=torch.double)
    mask = torch.arange(7)[None] < torch.tensor([7, 2, 5, 1, 3, 6])[:, None]
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 1.0], dtype=torch.double)
    return logps.requires_grad_(), old, ref, group_advantages(rewards, 3), mask


# Advantages


def test_advantages_are_standard_deviations_from_the_groups_own_mean():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 3.0, 1.0, 1.0, 3.0])
    found = group_advantages(rewards, 4, eps=0.0)
    root = math.sqrt(3)  # one of four right: mean 1/4, population std √3/4
    expected = torch.tensor([root, -1 / root, -1 / root, -1 / root, 1, -1, -1, 1])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        group_advantages(rewards, 4, scale=False),
        torch.tensor([0.75, -0.25, -0.25, -0.25, 1, -1, -1, 1]),
    )


def test_eps_is_added_to_the_standard_deviation():
    found = group_advantages(torch.tensor([0.0, 0.2]), 2, eps=0.1)
    torch.testing.assert_close(found, torch.tensor([-0.5, 0.5]))  # 0.1 / (0.1 + 0.1)


def test_a_constant_group_has_no_advantage_and_does_not_touch_its_neighbour():
    rewards = torch.tensor([0.7] * 5 + [0.0, 1.0, 0.0, 1.0, 1.0])
    found = group_advantages(rewards, 5)
    assert found[:5].abs().max() < 1e-2 and found[5:].abs().min() > 0.5
    assert group_advantages(torch.ones(6), 3).tolist() == [0.0] * 6


@pytest.mark.parametrize(
    "rewards, size, words",
    [
        (torch.ones(4), 1, "num_generations=1.*at least 2"),
        (torch.ones(7), 3, "7 rewards do not make groups of 3"),
        (torch.tensor([0.0, float("nan")]), 2, "not a finite number: nan"),
        (torch.tensor([0.0, float("inf")]), 2, "not a finite number: inf"),
    ],
)
def test_rewards_that_cannot_be_grouped(rewards, size, words):
    with pytest.raises(UserError, match=words):
        group_advantages(rewards, size)


# The loss


@pytest.mark.parametrize("policy_loss", ["clip", "cispo"])
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_the_loss_is_the_formula(sampled, policy_loss, beta):
    loss, _ = grpo_loss(*sampled, beta, EPS, policy_loss)
    assert float(loss.detach()) == pytest.approx(by_hand(*sampled, beta, policy_loss), abs=1e-12)


def test_sequences_weigh_the_same_however_long():
    """Per token, the long answer would outvote the short one nine to one."""
    logps = torch.zeros(2, 9, requires_grad=True)
    mask = torch.arange(9)[None] < torch.tensor([9, 1])[:, None]
    loss, _ = grpo_loss(
        logps, logps.detach(), logps.detach(), torch.tensor([-1.0, 1.0]), mask, 0.0, EPS
    )
    loss.backward()
    assert float(loss.detach()) == 0
    torch.testing.assert_close(logps.grad.sum(1), torch.tensor([0.5, -0.5]))


def test_the_first_step_has_loss_zero_and_the_policy_gradient(sampled):
    logps, _, _, advantages, mask = sampled
    here = logps.detach()
    loss, metrics = grpo_loss(logps, here, here, advantages, mask, 0.5, EPS)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    expected = -(advantages[:, None] * mask) / mask.sum(1, keepdim=True) / 6
    torch.testing.assert_close(logps.grad, expected)
    assert metrics["kl"] == 0 and metrics["clip_fraction"] == 0


@pytest.mark.parametrize("policy_loss", ["clip", "cispo"])
def test_what_stands_beyond_the_end_does_not_matter(sampled, policy_loss):
    logps, old, ref, advantages, mask = sampled
    clean, _ = grpo_loss(*sampled, 0.3, EPS, policy_loss)
    spoiled = [x.detach().masked_fill(~mask, value) for x, value in
               ((logps, -math.inf), (old, math.nan), (ref, math.inf))]  # fmt: skip
    spoiled[0].requires_grad_()
    dirty, metrics = grpo_loss(*spoiled, advantages, mask.float(), 0.3, EPS, policy_loss)
    dirty.backward()
    assert dirty == clean and spoiled[0].grad.isfinite().all()
    assert spoiled[0].grad[~mask].abs().max() == 0
    assert all(value.isfinite() for value in metrics.values())


def one_token(ratio, advantage, policy_loss):
    """Gradient and clip fraction of one sampled token whose probability moved by `ratio`."""
    logps = torch.tensor([[math.log(0.1 * ratio)]], requires_grad=True)
    old = torch.tensor([[math.log(0.1)]])
    loss, metrics = grpo_loss(logps, old, old, torch.tensor([advantage]), torch.ones(1, 1), 0.0, EPS, policy_loss)  # fmt: skip
    loss.backward()
    return float(logps.grad), float(metrics["clip_fraction"])


@pytest.mark.parametrize(
    "ratio, advantage, clip, cispo",
    [
        (
            1.5,
            2.0,
            (0.0, 1),
            (-1.2 * 2, 1),
        ),  # far enough: PPO lets go, CISPO pulls with less weight
        (1.5, -2.0, (1.5 * 2, 0), (1.2 * 2, 1)),  # the wrong way: back at full force
        (0.5, 2.0, (-0.5 * 2, 0), (-0.5 * 2, 0)),
        (0.5, -2.0, (0.0, 1), (0.5 * 2, 0)),
        (1.1, 2.0, (-1.1 * 2, 0), (-1.1 * 2, 0)),
    ],
)
def test_what_the_clip_lets_through(ratio, advantage, clip, cispo):
    assert one_token(ratio, advantage, "clip") == pytest.approx(clip, rel=1e-5)
    assert one_token(ratio, advantage, "cispo") == pytest.approx(cispo, rel=1e-5)


def test_kl_pulls_towards_the_reference_from_both_sides():
    for gap, sign in ((0.5, 1), (-0.5, -1)):  # π above the reference: descent must lower it
        logps = torch.tensor([[-1.0 + gap]], requires_grad=True)
        ref = torch.tensor([[-1.0]])
        loss, metrics = grpo_loss(logps, logps.detach(), ref, torch.zeros(1), torch.ones(1, 1), 2.0, EPS)  # fmt: skip
        loss.backward()
        assert float(metrics["kl"]) == pytest.approx(math.exp(-gap) + gap - 1)
        assert float(loss.detach()) == pytest.approx(2 * (math.exp(-gap) + gap - 1))
        assert (
            float(logps.grad) == pytest.approx(2 * (1 - math.exp(-gap)))
            and float(logps.grad) * sign > 0
        )


def test_k3_is_the_kl_on_average():
    policy, reference = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    estimates = k3(policy.log(), reference.log())
    exact = (policy * (policy / reference).log()).sum()
    assert estimates.min() >= 0
    torch.testing.assert_close((policy * estimates).sum(), exact)


def test_an_unknown_policy_loss_is_named():
    x = torch.zeros(2, 1)
    with pytest.raises(UserError, match="'ppo'.*cispo"):
        grpo_loss(x, x, x, torch.zeros(2), torch.ones(2, 1), 0.0, EPS, "ppo")
