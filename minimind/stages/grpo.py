"""Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300): learn from reward alone.

For every prompt a group of answers is sampled and rewarded. What is better than its own group
becomes more likely, what is worse less likely: the group's mean stands in for the value network
of PPO, and a frozen copy of the starting weights holds the policy near where it was.

Left out: process rewards for single steps (section 4.1.3) and a reference that is renewed during
the run (algorithm 1, line 2); neither is needed when the end of an answer can be checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minimind.config import POLICY_LOSSES, TOO_SMALL_A_GROUP, GRPOConfig
from minimind.data import IGNORED, Batch
from minimind.errors import UserError, bad_value
from minimind.rewards import Rewards
from minimind.stages.common import batch_logps, centred, frozen_copy, k3, sequence_mean
from minimind.stages.rl import (
    SAMPLES_EVERY,
    add_logps,
    make_reward,
    print_sample,
    problem_numbers,
    read_problems,
    sample_answers,
    shared_batches,
)
from minimind.stages.task import Metrics, Task
from minimind.tokenizer import Tokenizer


def group_advantages(
    rewards: Tensor, group_size: int, eps: float = 1e-4, scale: bool = True
) -> Tensor:
    """Return how much better each answer is than its group, in standard deviations.

    A = (r - mean) / (std + eps) inside each group (arXiv 2402.03300, section 4.1.2). A group with
    equal rewards gives exactly 0: there is nothing to choose between.

    Args:
        rewards: (N,); the answers to one prompt stand together, `group_size` of them.
        scale: divide by the population standard deviation. False leaves the difference as it is
            (Dr. GRPO, arXiv 2503.20783): then groups that are nearly all right or all wrong do not
            weigh more than divided ones.

    Returns:
        (N,), the mean of every group 0.

    Raises:
        UserError: groups of fewer than two, N not a multiple of the group, a reward not finite.
    """
    if group_size < 2:
        raise UserError(TOO_SMALL_A_GROUP.format(group_size))
    if len(rewards) % group_size:
        raise UserError(
            f"{len(rewards)} rewards do not make groups of {group_size}. Give one for each answer."
        )
    if not rewards.isfinite().all():
        raise UserError(f"A reward is not a finite number: {rewards[~rewards.isfinite()][0]}.")
    groups = rewards.view(-1, group_size)
    advantages = centred(groups)
    if scale:
        advantages = advantages / (groups.std(1, keepdim=True, correction=0) + eps)
    return advantages.view(-1)


def grpo_loss(
    logps: Tensor, old_logps: Tensor, ref_logps: Tensor, advantages: Tensor, mask: Tensor,
    beta: float, clip_eps: float, policy_loss: str = "clip",
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """Return the loss whose descent raises the reward, and figures to log.

    Per token, with r = π/π_old = e^(logps - old_logps):

    - "clip": -min(r·A, clip(r, 1-ε, 1+ε)·A) + β·k3(π ‖ ref) (arXiv 2402.03300, eqs. 3-4);
    - "cispo": -stop(min(r, 1+ε))·A·ln π + β·k3: the weight is clipped, not the token's gradient
      (MiniMax-M1, arXiv 2506.13585, eqs. 4-5, where the lower limit is switched off too).

    The mean is taken inside each sequence, then over sequences. Before the first update r is 1
    and the policy's part is -mean(A) = 0: its value says nothing, its gradient everything.

    Args:
        logps, old_logps, ref_logps: (N, T) log-probabilities of the sampled tokens under the
            policy (with gradient), the policy that sampled, and the frozen reference.
        advantages: (N,).
        mask: (N, T), 1 where a token was sampled; what stands elsewhere does not matter.
    """
    mask, better = mask.bool(), advantages[:, None]
    logps, old_logps, ref_logps = (
        x.masked_fill(~mask, 0) for x in (logps, old_logps, ref_logps)
    )  # so that nothing beyond a sequence's end can become inf · 0
    ratio = (logps - old_logps).exp()
    if policy_loss == "clip":
        gain = torch.min(ratio * better, ratio.clamp(1 - clip_eps, 1 + clip_eps) * better)
        clipped = torch.where(better < 0, ratio < 1 - clip_eps, ratio > 1 + clip_eps)
    elif policy_loss == "cispo":
        gain = ratio.detach().clamp(max=1 + clip_eps) * better * logps
        clipped = ratio > 1 + clip_eps
    else:
        raise bad_value("policy_loss", policy_loss, POLICY_LOSSES)
    kl = k3(logps, ref_logps)
    loss = sequence_mean(beta * kl - gain, mask)
    figures = {"kl": sequence_mean(kl, mask), "clip_fraction": sequence_mean(clipped.float(), mask)}
    return loss, {name: value.detach() for name, value in figures.items()}


@dataclass
class GRPO:
    """The stage at work: its settings, its problems, the frozen reference and the reward."""

    config: GRPOConfig
    tokenizer: Tokenizer
    problems: Sequence[dict]
    reference: nn.Module
    reward: Rewards

    def rollout(
        self, model: nn.Module, batches: Sequence[Batch], step: int
    ) -> tuple[list[list[Batch]], dict[str, float]]:
        """Sample and reward groups of answers; return them, `num_iterations` times, to train on.

        With beta = 0 a group of equal rewards has no gradient at all, so it is left out of the
        training, and the advantages of the others shrink by their share: the loss stays the mean
        over all answers. The KL that is logged is that of the answers trained on.
        """
        config = self.config
        rows = [self.problems[i] for batch in batches for i in batch["row"].tolist()]
        answers = sample_answers(
            model, rows, config.num_generations, config, self.tokenizer, self.reward, step
        )
        advantages = group_advantages(answers.rewards, config.num_generations)
        groups = answers.rewards.view(-1, config.num_generations)
        dead, kept = groups.amax(1) == groups.amin(1), None
        if config.beta == 0 and dead.any() and not dead.all():
            kept = ~dead.repeat_interleave(config.num_generations)
            advantages = advantages * kept.float().mean()
        columns = {"advantages": advantages}
        training = shared_batches(answers, columns, self.tokenizer.pad_id, kept)
        add_logps("ref_logps", self.reference, training, config)
        if config.num_iterations > 1:
            add_logps("old_logps", model, training, config)
        print_sample(answers, step, every=SAMPLES_EVERY * config.log_interval)
        figures = {**answers.figures(), "dead_groups": float(dead.float().mean())}
        return [training] * config.num_iterations, figures

    def count(self, batch: Batch) -> int:
        """Return the number of answers in the batch."""
        return len(batch["input_ids"])

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """`grpo_loss` of the answers in the batch.

        With one update per rollout the policy that sampled is the policy itself.
        """
        logps = batch_logps(model, batch)
        loss, metrics = grpo_loss(
            logps, batch.get("old_logps", logps.detach()), batch["ref_logps"], batch["advantages"],
            batch["labels"][:, 1:] != IGNORED, self.config.beta, self.config.clip_eps, self.config.policy_loss,
        )  # fmt: skip
        return loss + model.router_loss, metrics


def grpo_task(config: GRPOConfig, model: nn.Module, tokenizer: Tokenizer) -> Task:
    """Read the problems of `data_path` and freeze a copy of the model as the reference."""
    problems = read_problems(config, tokenizer, model.config.max_position_embeddings)
    stage = GRPO(
        config, tokenizer, problems, frozen_copy(model), make_reward(config, problems, model.device)
    )
    return Task(
        train=[{"row": [i]} for i in range(len(problems))],
        heldout=[],  # a loss of 0 by design measures nothing; evaluate.py samples instead
        lengths=problems.lengths,
        collate=problem_numbers,
        loss=stage.loss,
        count=stage.count,
        rollout=stage.rollout,
        warnings=dict(problems.faults),
    )
