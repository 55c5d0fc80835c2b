"""Single-stream policy optimisation (SPO, arXiv 2509.13232): one answer per prompt, and a memory.

With a group of one there is nobody to compare an answer with. So a tracker remembers what reward
each prompt (or each kind of prompt) has earned, and an answer is judged by what was to be expected
before it was seen. What the policy was worth before it moved is forgotten, the faster it moves.
(The guide that this course follows spells the name out as "self-play". Nothing here plays against
itself: the algorithm that it trains is this one.)

Left out: the tracker's first guess from several samples of every prompt (here it starts undecided)
and PPO's clip, which does nothing as long as every answer is used for one update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minimind import distributed
from minimind.config import SPOConfig
from minimind.data import IGNORED, Batch
from minimind.errors import UserError
from minimind.rewards import Rewards
from minimind.stages.common import batch_logps, centred, frozen_copy, k3, sequence_mean
from minimind.stages.rl import (
    ROWS,
    SAMPLES_EVERY,
    SEEDS_PER_STEP,
    Answers,
    add_logps,
    make_reward,
    print_sample,
    problem_numbers,
    read_problems,
    sample_answers,
    shared_batches,
    training_batches,
)
from minimind.stages.task import Metrics, Task
from minimind.tokenizer import Tokenizer

FEW = 12  # kinds of problems that are logged one by one
EXPECTED = 0.05  # a reward so near to the value taught nothing
CLIP = 0.2  # GRPO's, to say how much of an update it would have stopped


class ValueTracker:
    """For every key (a prompt, or a kind of prompt) a belief about the reward: Beta(α, β).

    α counts successes and β failures; both fade. The baseline is the mean v = α/(α+β). Before new
    rewards are added the old counts shrink by ρ = 2^(-D/D_half), limited to [ρ_min, ρ_max], where D
    is how far the policy has moved (KL, nats per token) since the key was last updated. A key starts
    at v = 1/2 with the weight 1/(1-ρ_min) of the fewest answers it can be down to (section 3).

    A key that gets n answers each time remembers n/(1-ρ) of them. D_half = 0.06 is meant for prompts
    that come back after many steps. One step moves a policy far less: where keys are updated at
    every step, D_half must be of the size of a step's KL, or nothing ever fades faster than ρ_max.
    """

    def __init__(self, d_half: float = 0.06, rho_min: float = 0.5, rho_max: float = 0.96) -> None:
        self.d_half, self.rho_min, self.rho_max = d_half, rho_min, rho_max
        self.beliefs: dict[str, tuple[float, float]] = {}

    def belief(self, key: str) -> tuple[float, float]:
        """Return (α, β) of a key."""
        undecided = 0.5 / (1 - self.rho_min)
        return self.beliefs.get(key, (undecided, undecided))

    def baseline(self, keys: Sequence[str]) -> Tensor:
        """Return the expected reward v = α/(α+β) of every key, (N,). Ask before `update`."""
        pairs = [self.belief(key) for key in keys]
        return torch.tensor([alpha / (alpha + beta) for alpha, beta in pairs])

    def rho(self, kl: float) -> float:
        """Return the share of the old counts that is kept after the policy has moved by `kl`."""
        return min(max(2 ** (-kl / self.d_half), self.rho_min), self.rho_max)

    def update(self, keys: Sequence[str], rewards: Tensor, kl: float | Sequence[float]) -> None:
        """Forget, then count: α ← ρ·α + r and β ← ρ·β + 1 - r.

        Several rewards of one key come from one policy, so the key forgets once and counts all.

        Args:
            keys: (N,).
            rewards: (N,) in [0, 1], where a Beta distribution lives.
            kl: how far the policy has moved since the last update, one number or one for each key.

        Raises:
            UserError: unequal lengths, a reward outside [0, 1] or NaN, a negative KL.
        """
        moved = [float(kl)] * len(keys) if isinstance(kl, int | float) else [float(d) for d in kl]
        rewards = [float(reward) for reward in rewards]
        _check_update(keys, rewards, moved)
        shares = {key: self.rho(d) for key, d in zip(keys, moved, strict=True)}
        for key, rho in shares.items():
            alpha, beta = self.belief(key)
            self.beliefs[key] = (rho * alpha, rho * beta)
        for key, reward in zip(keys, rewards, strict=True):
            alpha, beta = self.beliefs[key]
            self.beliefs[key] = (alpha + reward, beta + 1 - reward)

    def state_dict(self) -> dict:
        """Return all beliefs, for the resume point."""
        return {"beliefs": dict(self.beliefs)}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned."""
        self.beliefs = dict(state["beliefs"])


def _check_update(keys: Sequence[str], rewards: Sequence[float], moved: Sequence[float]) -> None:
    if not len(keys) == len(rewards) == len(moved):
        raise UserError(
            f"{len(keys)} keys, {len(rewards)} rewards and {len(moved)} KL values: give one reward "
            "for each key, and one KL for all or for each."
        )
    for key, reward in zip(keys, rewards, strict=True):
        if not 0 <= reward <= 1:
            raise UserError(
                f"The reward of {key!r} is {reward}; a Beta belief takes numbers in [0, 1]. "
                "Map rewards there first: (reward - lowest) / (highest - lowest)."
            )
    wrong = [d for d in moved if not d >= 0]
    if wrong:
        raise UserError(f"The KL {wrong[0]} is not a number from 0 up. How far did the policy go?")


def spo_advantages(rewards: Tensor, values: Tensor, eps: float = 1e-4) -> Tensor:
    """Return how much better each answer is than expected, normalised over the batch.

    A = r - v, then (A - mean) / (std + eps) with the population's standard deviation.

    Args:
        rewards: (N,).
        values: (N,) `ValueTracker.baseline` from BEFORE these rewards were counted: a baseline that
            has seen them would take back part of what they say.
    """
    surprise = rewards - values
    return centred(surprise) / (surprise.std(correction=0) + eps)


def spo_loss(
    logps: Tensor, ref_logps: Tensor, advantages: Tensor, mask: Tensor, beta: float
) -> tuple[Tensor, Metrics]:
    """Return -A·ln π + β·k3(π ‖ ref), and figures to log.

    The mean is taken inside each sequence, then over sequences. Answers are fresh, so no ratio
    π/π_old is needed: it would be 1, and has this gradient.

    Args:
        logps, ref_logps: (N, T) log-probabilities of the sampled tokens under the policy (with
            gradient) and the frozen reference.
        advantages: (N,).
        mask: (N, T), 1 where a token was sampled; what stands elsewhere does not matter.
        beta: weight of the distance to the reference.
    """
    mask = mask.bool()
    logps, ref_logps = logps.masked_fill(~mask, 0), ref_logps.masked_fill(~mask, 0)
    kl = k3(logps, ref_logps)
    loss = sequence_mean(beta * kl - advantages[:, None] * logps, mask)
    return loss, {"kl": sequence_mean(kl, mask).detach()}


def sampling_weights(values: Tensor, epsilon: float) -> Tensor:
    """Return how often each problem should be drawn, relative to the others: √(v(1-v)) + ε (N,).

    That is the standard deviation of a reward that is 0 or 1: most is learnt where the outcome is
    open. ε keeps what is solved, or hopeless, in sight (section 3).
    """
    return (values * (1 - values)).clamp(min=0).sqrt() + epsilon


def problem_key(row: dict) -> str:
    """Return whose belief a problem belongs to: its "kind", or else the prompt itself.

    A prompt that is seen once or twice never has a belief of its own; problems of one kind (here:
    of one length) are about equally hard and can share one.
    """
    return str(row.get("kind") or row["conversations"][:-1])


@dataclass
class SPO:
    """The stage at work, and its memory: the tracker, and what is needed to see the policy move.

    Attributes:
        tracker: of rewards from 0, the lowest that a problem can give, to 1, the highest.
        keys: of each problem, see `problem_key`.
        path: nats per token that the policy has moved in all, summed step by step.
        seen: key to the `path` when its belief was last updated.
        probe: the last answers, with their log-probabilities when they were sampled.
    """

    config: SPOConfig
    tokenizer: Tokenizer
    problems: Sequence[dict]
    reference: nn.Module
    reward: Rewards
    tracker: ValueTracker = field(init=False)
    path: float = 0.0
    seen: dict[str, float] = field(default_factory=dict)
    probe: Batch = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tracker = ValueTracker(self.config.d_half)
        self.keys = [problem_key(row) for row in self.problems]

    def rollout(
        self, model: nn.Module, batches: Sequence[Batch], step: int
    ) -> tuple[list[list[Batch]], dict[str, float]]:
        """Draw as many problems as the batches hold, sample and reward one answer to each.

        The order of the data is not kept: which problems are drawn depends on the tracker.

        Logged beside what GRPO logs: `value` (expected of all problems, after this step), `surprise`
        (its deviation), `step_kl` and `clip_fraction` of the last update, as `moved` returns them.
        A group of one is dead if its reward is what was expected.
        """
        config, (moved, clipped) = self.config, distributed.of_first(self.moved(model))
        drawn = self.draw(sum(len(batch["row"]) for batch in batches), step)
        rows, keys = [self.problems[i] for i in drawn], [self.keys[i] for i in drawn]
        answers = sample_answers(model, rows, 1, config, self.tokenizer, self.reward, step)
        rewards, values = answers.unit_rewards, self.tracker.baseline(keys)  # not updated yet
        columns = {"advantages": spo_advantages(rewards, values)}
        training = shared_batches(answers, columns, self.tokenizer.pad_id)
        add_logps("ref_logps", self.reference, training, config)
        self.remember(keys, rewards, moved)
        self.keep_probe(model, answers)
        print_sample(answers, step, every=SAMPLES_EVERY * config.log_interval)
        figures = {
            "value": float(self.tracker.baseline(self.keys).mean()),
            "surprise": float((rewards - values).std(correction=0)),
            "dead_groups": float(((rewards - values).abs() < EXPECTED).float().mean()),
            "clip_fraction": clipped,
            "step_kl": moved,
            "rho": self.tracker.rho(moved),
        }
        return [training], {**answers.figures(), **figures, **self.values_by_kind()}

    def values_by_kind(self) -> dict[str, float]:
        """Return what is expected of each kind, to be logged; nothing if there are too many."""
        kinds = sorted(set(self.keys))
        if len(kinds) > FEW:
            return {}
        values = self.tracker.baseline(kinds).tolist()
        return {f"value_{kind}": value for kind, value in zip(kinds, values, strict=True)}

    def draw(self, count: int, step: int) -> list[int]:
        """Return the numbers of `count` different problems, the open ones more often."""
        weights = sampling_weights(self.tracker.baseline(self.keys), self.config.priority_epsilon)
        seed = self.config.seed + SEEDS_PER_STEP * (step + 1) - 1
        numbers = torch.Generator().manual_seed(seed)
        count = min(count, len(self.problems))
        return torch.multinomial(weights, count, generator=numbers).tolist()

    def moved(self, model: nn.Module) -> tuple[float, float]:
        """Return how far the last update moved the policy on its own answers.

        Returns:
            KL(before ‖ now) in nats per token, estimated by k3; and the share of tokens whose
            probability changed by more than GRPO's clip allows.
        """
        if not self.probe:
            return 0.0, 0.0
        add_logps("now", model, [self.probe], self.config)
        before, now, labels = (self.probe[name].cpu() for name in ("before", "now", "labels"))
        far = ((now - before).exp() - 1).abs() > CLIP
        trained = labels[:, 1:] != IGNORED
        kl, clipped = (sequence_mean(x, trained) for x in (k3(before, now), far.float()))
        return float(kl), float(clipped)

    def keep_probe(self, model: nn.Module, answers: Answers) -> None:
        """Keep some of the answers, to see on them how far the coming update moves the policy."""
        some = torch.arange(len(answers.problems)) < ROWS
        self.probe = training_batches(answers, {}, self.tokenizer.pad_id, some)[0]
        add_logps("before", model, [self.probe], self.config)

    def remember(self, keys: Sequence[str], rewards: Tensor, moved: float) -> None:
        """Update the tracker; each key forgets by what the policy has moved since its own last time."""
        self.path += moved
        since = [self.path - self.seen.get(key, self.path) for key in keys]
        self.tracker.update(keys, rewards, since)
        self.seen.update(dict.fromkeys(keys, self.path))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """`spo_loss` of the answers in the batch."""
        logps = batch_logps(model, batch)
        trained = batch["labels"][:, 1:] != IGNORED
        loss, metrics = spo_loss(
            logps, batch["ref_logps"], batch["advantages"], trained, self.config.beta
        )
        return loss + model.router_loss, metrics

    def count(self, batch: Batch) -> int:
        """Return the number of answers in the batch."""
        return len(batch["input_ids"])

    def state_dict(self) -> dict:
        """Return what the next step depends on beside the weights."""
        return {"tracker": self.tracker.state_dict(), "path": self.path, "seen": dict(self.seen),
                "probe": dict(self.probe)}  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned."""
        self.tracker.load_state_dict(state["tracker"])
        self.path, self.seen, self.probe = state["path"], dict(state["seen"]), dict(state["probe"])


def spo_task(config: SPOConfig, model: nn.Module, tokenizer: Tokenizer) -> Task:
    """Read the problems of `data_path` and freeze a copy of the model as the reference."""
    if config.batch_size * config.accumulation_steps * distributed.size() < 2:
        raise UserError(
            "batch_size=1 and accumulation_steps=1: advantages are normalised over the answers of "
            "a step, and one answer has nothing to be compared with. Raise either."
        )
    problems = read_problems(config, tokenizer, model.config.max_position_embeddings)
    reward = make_reward(config, problems, model.device)
    stage = SPO(config, tokenizer, problems, frozen_copy(model), reward)
    return Task(
        train=[{"row": [i]} for i in range(len(problems))],
        heldout=[],  # the loss says nothing of the skill; evaluate.py samples instead
        lengths=problems.lengths,
        collate=problem_numbers,
        loss=stage.loss,
        count=stage.count,
        rollout=stage.rollout,
        memory=stage,
        warnings=dict(problems.faults),
    )
