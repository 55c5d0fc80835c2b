"""SPO: the tracker and the loss against slow ones written out, what is drawn, and the whole run."""

import math

import pytest
import torch
from helpers import SMALL, ends_now_and_then, write_lines

import minimind
from minimind import UserError
from minimind.checkpoint import read_tensors, save_weight
from minimind.config import stage_config
from minimind.rewards import Rewards
from minimind.stages.common import frozen_copy
from minimind.stages.grpo import grpo_loss
from minimind.stages.spo import (
    SPO,
    ValueTracker,
    problem_key,
    sampling_weights,
    spo_advantages,
    spo_loss,
)
from minimind.trainer import Run, make_optimizers, make_scaler, optimizer_step


def beliefs(tracker):
    return {key: pytest.approx(pair) for key, pair in tracker.beliefs.items()}


# The tracker


def test_a_belief_starts_undecided_and_counts_what_it_sees():
    tracker = ValueTracker()
    assert tracker.baseline(["new", "newer"]).tolist() == [0.5, 0.5]
    assert tracker.beliefs == {}  # to ask is not to count
    tracker.update(["a", "b"], torch.tensor([1.0, 0.25]), 0.06)  # half of Beta(1, 1) is forgotten
    assert beliefs(tracker) == {"a": (1.5, 0.5), "b": (0.75, 1.25)}
    assert tracker.baseline(["b", "a", "c"]).tolist() == [0.375, 0.75, 0.5]
    tracker.update(["a"], torch.tensor([0.0]), 0.02)
    rho = 2 ** (-1 / 3)
    assert beliefs(tracker) == {"a": (1.5 * rho, 0.5 * rho + 1), "b": (0.75, 1.25)}


@pytest.mark.parametrize(
    "kl, rho", [(0.0, 0.96), (0.001, 0.96), (0.03, 2**-0.5), (0.06, 0.5), (0.3, 0.5)]
)
def test_the_further_the_policy_moved_the_more_is_forgotten(kl, rho):
    assert ValueTracker().rho(kl) == pytest.approx(rho)
    tracker = ValueTracker()
    tracker.beliefs = {"a": (8.0, 4.0)}
    tracker.update(["a"], torch.tensor([1.0]), kl)
    assert tracker.beliefs["a"] == pytest.approx((8 * rho + 1, 4 * rho))


def test_its_memory_is_as_long_as_the_limits_say():
    tracker = ValueTracker(rho_min=0.5, rho_max=0.96)
    for _ in range(500):
        tracker.update(["still", "moving"], torch.tensor([1.0, 1.0]), [0.0, 9.0])
    weights = {key: sum(pair) for key, pair in tracker.beliefs.items()}
    assert weights == pytest.approx({"still": 1 / (1 - 0.96), "moving": 1 / (1 - 0.5)})
    tracker.update(["still", "moving"], torch.tensor([0.0, 0.0]), [0.0, 9.0])
    found = tracker.baseline(["still", "moving"])
    torch.testing.assert_close(found, torch.tensor([0.96, 0.5]))


def test_several_rewards_of_one_key_forget_once_whatever_their_order():
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0])
    tracker, turned = ValueTracker(), ValueTracker()
    tracker.update(["a", "b", "a", "a"], rewards, 0.06)
    turned.update(["a", "a", "b", "a"], rewards[[3, 2, 1, 0]], [0.06] * 4)
    assert beliefs(tracker) == {"a": (0.5 + 2.5, 0.5 + 0.5), "b": (0.5, 1.5)}
    assert beliefs(turned) == tracker.beliefs


def test_a_tracker_comes_back_from_a_file_of_numbers(tmp_path):
    tracker, again = ValueTracker(), ValueTracker()
    tracker.update(["7", "8", "7"], torch.tensor([1.0, 0.3, 0.0]), 0.01)
    torch.save(tracker.state_dict(), tmp_path / "t.pth")
    again.load_state_dict(read_tensors(tmp_path / "t.pth"))
    for t in (tracker, again):
        t.update(["7", "9"], torch.tensor([0.1, 0.2]), 0.04)
    assert again.beliefs == tracker.beliefs
    assert not torch.equal(again.baseline(["7"]), ValueTracker().baseline(["7"]))


@pytest.mark.parametrize(
    "keys, rewards, kl, words",
    [
        (["a", "b"], [0.5, 1.5], 0.0, r"reward of 'b' is 1\.5.*\[0, 1\].*lowest"),
        (["a"], [-3.0], 0.0, r"reward of 'a' is -3\.0"),
        (["a", "b"], [float("nan"), 0.0], 0.0, r"reward of 'a' is nan"),
        (["a", "b"], [1.0], 0.0, r"2 keys, 1 rewards"),
        (["a"], [1.0, 1.0], 0.0, r"1 keys, 2 rewards"),
        (["a"], [1.0], [0.0, 0.1], r"1 keys, 1 rewards and 2 KL"),
        (["a"], [1.0], -0.1, r"KL -0\.1"),
        (["a"], [1.0], float("nan"), r"KL nan"),
    ],
)
def test_what_is_no_reward_is_refused_and_nothing_is_counted(keys, rewards, kl, words):
    tracker = ValueTracker()
    with pytest.raises(UserError, match=words):
        tracker.update(keys, torch.tensor(rewards), kl)
    assert tracker.beliefs == {}


# Advantages and loss


def test_advantages_are_surprises_in_standard_deviations_of_the_whole_batch():
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    values = torch.tensor([0.9, 0.9, 0.2, 0.2])  # surprises 0.1, -0.9, 0.8, -0.2; mean -0.05
    std = math.sqrt((0.15**2 + 0.85**2 + 0.85**2 + 0.15**2) / 4)
    expected = torch.tensor([0.15, -0.85, 0.85, -0.15]) / std
    torch.testing.assert_close(spo_advantages(rewards, values, eps=0.0), expected)
    torch.testing.assert_close(
        spo_advantages(torch.tensor([0.0, 0.2]), torch.zeros(2), eps=0.1),
        torch.tensor([-0.5, 0.5]),
    )
    assert spo_advantages(torch.ones(3), torch.full((3,), 0.4)).abs().max() < 1e-3


@pytest.fixture
def sampled():
    """Five answers of unequal length, with advantages of both signs."""
    generator = torch.Generator().manual_seed(3)
    logps = -2 * torch.rand(5, 7, generator=generator, dtype=torch.double)
    ref = logps + 0.3 * torch.randn(5, 7, generator=generator, dtype=torch.double)
    advantages = torch.tensor([1.5, -0.5, 0.0, -2.0, 0.25], dtype=torch.double)
    mask = torch.arange(7)[None] < torch.tensor([7, 2, 5, 1, 3])[:, None]
    return logps.requires_grad_(), ref, advantages, mask


def by_hand(logps, ref, advantages, mask, beta):
    sequences, kls = [], []
    for i in range(len(logps)):
        steps = [t for t in range(logps.shape[1]) if mask[i, t]]
        d = [float(ref[i, t] - logps[i, t].detach()) for t in steps]
        k3 = [math.exp(x) - x - 1 for x in d]
        gain = sum(float(advantages[i] * logps[i, t].detach()) for t in steps)
        sequences.append((beta * sum(k3) - gain) / len(steps))
        kls.append(sum(k3) / len(steps))
    return sum(sequences) / len(logps), sum(kls) / len(logps)


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_the_loss_is_the_formula(sampled, beta):
    loss, metrics = spo_loss(*sampled, beta)
    expected, kl = by_hand(*sampled, beta)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-12)
    assert float(metrics["kl"]) == pytest.approx(kl, abs=1e-12)
    assert not metrics["kl"].requires_grad


def test_its_gradient_is_grpos_for_the_same_advantages(sampled):
    logps, ref, advantages, mask = sampled
    (mine,) = torch.autograd.grad(spo_loss(logps, ref, advantages, mask, 0.3)[0], logps)
    theirs = grpo_loss(logps, logps.detach(), ref, advantages, mask, 0.3, 0.2)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(theirs, logps)[0])
    assert (mine[~mask] == 0).all() and mine[mask].abs().min() >= 0


def test_what_stands_beyond_the_end_does_not_matter(sampled):
    logps, ref, advantages, mask = sampled
    clean, _ = spo_loss(*sampled, 0.3)
    spoiled = logps.detach().masked_fill(~mask, -torch.inf).requires_grad_()
    loss, _ = spo_loss(spoiled, ref.masked_fill(~mask, torch.nan), advantages, mask.long(), 0.3)
    loss.backward()
    assert float(loss.detach()) == float(clean.detach()) and spoiled.grad.isfinite().all()


def test_what_was_expected_to_the_last_bit_gives_no_advantage():
    assert spo_advantages(torch.full((5,), 0.7), torch.full((5,), 0.4)).tolist() == [0.0] * 5


# What is drawn


def test_open_problems_are_drawn_most_and_none_is_lost_from_sight():
    weights = sampling_weights(torch.tensor([0.0, 0.5, 1.0, 0.9]), 0.05)
    torch.testing.assert_close(weights, torch.tensor([0.05, 0.55, 0.05, 0.35]))


def test_problems_of_a_kind_share_a_belief_and_others_have_their_own():
    def row(text, **more):
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
        return {"conversations": turns, **more}

    assert problem_key(row("1+1?", kind="2")) == problem_key(row("2+2?", kind="2")) == "2"
    assert problem_key(row("1+1?")) == problem_key(row("1+1?", answer="2"))
    assert problem_key(row("1+1?")) != problem_key(row("2+2?"))


# The stage

KINDS = ("even", "odd", "odd")


def problems(count=6):
    return [
        {"conversations": [{"role": "user", "content": f"What is {i}+{2 * i}?" + " Say it." * (i % 3)},
                           {"role": "assistant", "content": ""}],
         "answer": str(3 * i), "kind": KINDS[i % 3]}
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def make_stage(small_model, tokenizer):
    def make(reward, rows=None, **settings):
        defaults = {"max_new_tokens": 6, "dtype": "float32", "device": "cpu", "log_interval": 1}
        config = stage_config("spo", **{**defaults, **settings})
        model = small_model(vocab_size=tokenizer.vocab_size, tie_word_embeddings=False)
        ends_now_and_then(model, tokenizer.eos_id)
        paid = reward if isinstance(reward, Rewards) else Rewards([("mine", 1.0, reward)])
        return model, SPO(config, tokenizer, rows or problems(), frozen_copy(model), paid)

    return make


def short(rows, texts):
    """A reward that can be learnt in a moment: stop early."""
    return torch.tensor([float(len(text) < 9) for text in texts])


def by_kind(rows, texts):
    return torch.tensor([0.9 if row["kind"] == "even" else 0.3 for row in rows])


PROMPTS = [{"row": torch.tensor([0, 3, 1])}, {"row": torch.tensor([5])}]


def update(run, stage, groups):
    for group in groups:
        optimizer_step(run, group, stage, 1e-3, stage.config)


def running(model, stage):
    model.train()
    optimizers = make_optimizers(model, stage.config)
    return Run(model, optimizers, make_scaler(stage.config, model.device))


def test_the_baseline_has_not_seen_the_reward_that_it_judges(make_stage):
    """Were it updated first, half the surprise of the first step would be gone."""
    model, stage = make_stage(by_kind, max_new_tokens=40)
    groups, figures = stage.rollout(model, PROMPTS, 0)
    rows = torch.cat([batch["advantages"] for batch in groups[0]])
    assert len(rows) == 4 and len(groups) == 1
    rewards = figures["reward"]
    evens = round((rewards * 4 - 4 * 0.3) / 0.6)
    surprises = torch.tensor([0.4] * evens + [-0.2] * (4 - evens))  # all against v = 1/2
    expected = spo_advantages(surprises, torch.zeros(4))
    torch.testing.assert_close(rows.sort().values, expected.sort().values)
    assert figures["surprise"] == pytest.approx(float(surprises.std(correction=0)))
    alpha, beta = stage.tracker.beliefs["odd"]
    assert alpha == pytest.approx(0.96 + 0.3 * (4 - evens)) and alpha + beta == pytest.approx(
        1.92 + 4 - evens
    )


def test_a_kind_that_earns_what_was_expected_has_no_advantage(make_stage):
    """Global normalisation alone would call every odd problem bad and every even one good."""
    model, stage = make_stage(by_kind, max_new_tokens=40)
    for step in range(12):
        _, figures = stage.rollout(model, PROMPTS, step)
    assert figures["surprise"] < 0.06 and figures["step_kl"] == 0 and figures["rho"] == 0.96
    assert figures["dead_groups"] == 1 and figures["clip_fraction"] == 0
    known = stage.tracker.baseline(["even", "odd"])
    torch.testing.assert_close(known, torch.tensor([0.9, 0.3]), atol=0.06, rtol=0)


def test_solved_problems_are_drawn_less_often_and_each_step_draws_anew(make_stage):
    _, stage = make_stage(short, problems(60), priority_epsilon=0.05)
    stage.tracker.beliefs = {"even": (99.0, 0.0), "odd": (1.0, 1.0)}
    drawn = [stage.draw(12, step) for step in range(50)]
    assert all(len(set(rows)) == 12 for rows in drawn) and drawn[0] != drawn[1]
    assert drawn == [stage.draw(12, step) for step in range(50)]
    evens = sum(stage.keys[i] == "even" for rows in drawn for i in rows) / 600
    assert 0 < evens < 0.1  # a third of all problems; 20·0.05 / (20·0.05 + 40·0.55) of the weight
    assert len(stage.draw(500, 0)) == 60


def test_the_way_of_the_policy_is_measured_and_forgets(make_stage):
    model, stage = make_stage(short, learning_rate=1e-3)
    run, before = running(model, stage), frozen_copy(model)
    update(run, stage, stage.rollout(model, PROMPTS, 0)[0])
    labels = stage.probe["labels"]
    with torch.no_grad():
        distributions = [m(stage.probe["input_ids"])[:, :-1].log_softmax(-1) for m in (before, model)]  # fmt: skip
    exact = (distributions[0].exp() * (distributions[0] - distributions[1])).sum(-1)
    exact = float(exact[labels[:, 1:] != -100].mean())
    probe = stage.probe
    figures = stage.rollout(model, PROMPTS, 1)[1]
    assert figures["step_kl"] == pytest.approx(exact, rel=0.8) and exact > 1e-4
    assert stage.path == figures["step_kl"]
    assert figures["rho"] == stage.tracker.rho(figures["step_kl"])
    ratio = (probe["now"] - probe["before"]).exp()
    wide = ((ratio - 1).abs() > 0.2).float() * (probe["labels"][:, 1:] != -100)
    share = (wide.sum(1) / (probe["labels"] != -100).sum(1)).mean()
    assert figures["clip_fraction"] == pytest.approx(float(share)) and share > 0


def test_the_tracker_forgets_as_fast_as_the_setting_says(make_stage):
    _, stage = make_stage(short, d_half=1e-4)
    stage.remember(["a"], torch.tensor([1.0]), 0.0)
    stage.remember(["a"], torch.tensor([1.0]), 1e-4)
    assert stage.tracker.beliefs["a"] == pytest.approx((0.5 * 1.96 + 1, 0.5 * 0.96))


def test_verified_and_judged_problems_are_each_scaled_by_what_they_can_get(make_stage):
    """On one scale for all, a problem that is always right or always wrong would look half open."""
    rows = problems()
    for row in rows[3:]:
        del row["answer"]
    paid = Rewards([("exact", 1.0), ("reward_model", 1.0, lambda rows, texts: [0.0 if "answer" in row else 3.0 for row in rows])])  # fmt: skip
    model, stage = make_stage(paid, rows, max_new_tokens=40)
    stage.keys = [str(i) for i in range(6)]
    for step in range(9):
        stage.rollout(model, [{"row": torch.arange(6)}], step)
    values = stage.tracker.baseline(stage.keys)
    assert values[:3].max() < 0.2 and values[3:].min() > 0.8


@pytest.mark.parametrize(
    "values, words", [([1.0], "1.* values for 4"), ([math.nan] * 4, "answer 0 is nan")]
)
def test_a_reward_of_the_wrong_length_or_nan_is_refused(make_stage, values, words):
    model, stage = make_stage(lambda rows, texts: values)
    with pytest.raises(UserError, match=words):
        stage.rollout(model, PROMPTS, 0)


def test_a_key_that_was_away_forgets_all_that_the_policy_moved_meanwhile(make_stage):
    _, stage = make_stage(short)
    stage.remember(["a", "b"], torch.tensor([1.0, 1.0]), 0.0)
    stage.remember(["b"], torch.tensor([1.0]), 0.02)
    before = dict(stage.tracker.beliefs)
    stage.remember(["a", "b"], torch.tensor([1.0, 1.0]), 0.03)
    for key, moved in (("a", 0.05), ("b", 0.03)):
        rho = 2 ** (-moved / 0.06)
        expected = (rho * before[key][0] + 1, rho * before[key][1])
        assert stage.tracker.beliefs[key] == pytest.approx(expected)


def test_the_reward_rises(make_stage):
    model, stage = make_stage(short, problems(24))
    run, rewards = running(model, stage), []
    for step in range(12):
        groups, figures = stage.rollout(model, [{"row": torch.arange(24)}], step)
        rewards.append(figures["reward"])
        update(run, stage, groups)
    assert rewards[0] < 0.7 and sum(rewards[-4:]) / 4 > 0.9, rewards


# The run


@pytest.fixture
def settings(tmp_path, small_model, tokenizer):
    """A weight to start from, problems, and settings that fit both."""
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = small_model(
        vocab_size=tokenizer.vocab_size, rope_theta=1e6, tie_word_embeddings=False, **shape
    )
    ends_now_and_then(model, tokenizer.eos_id)
    save_weight(tmp_path / "out/reason_32.pth", model, tokenizer, [], {})
    small = {**SMALL, "max_seq_len": 64, "learning_rate": 1e-3, "batch_size": 2}
    return {**small, "max_new_tokens": 5, "out_dir": str(tmp_path / "out"), "epochs": 4, "beta": 0.1,
            "data_path": write_lines(tmp_path / "grpo.jsonl", problems()), "save_interval": 2}  # fmt: skip


@pytest.fixture
def some_are_right(monkeypatch):
    """Rewards that depend on the sample, so that what the tracker knows is not trivial."""

    def letters(rows, texts):
        return torch.tensor([len(text) % 3 / 2 for text in texts])

    monkeypatch.setattr(
        "minimind.stages.spo.make_reward", lambda *_: Rewards([("letters", 1.0, letters)])
    )


def same_but_for_time(one, other):
    clocks = {"tokens_per_second": 0, "rollout_share": 0}
    assert [{**row, **clocks} for row in one] == [{**row, **clocks} for row in other]


def test_a_run_logs_what_one_wants_to_know(settings, some_are_right, capsys):
    result = minimind.train("spo", **settings)
    assert result.weight_path.name == "spo_32.pth" and result.metrics["steps"] == 6
    for row in result.history:
        assert {"reward", "accuracy", "kl", "clip_fraction", "dead_groups", "entropy", "length", "truncated", "value", "surprise",
                "step_kl", "rho", "value_even", "value_odd"} <= set(row)  # fmt: skip
        assert 0 < row["value"] < 1 and row["entropy"] > 0
    assert sum(row["reward"] for row in result.history) > 0.5
    assert result.history[0]["kl"] == 0 < result.history[-1]["kl"]
    assert "What is" in capsys.readouterr().out


def test_a_run_that_was_cut_off_in_the_middle_goes_on_bit_for_bit(settings, some_are_right):
    whole = minimind.train("spo", **settings)
    wanted = read_tensors(whole.weight_path)
    last = read_tensors(whole.weight_path.parent / "checkpoints/spo_32_resume.pth")

    def stop(step, model):
        if step == 3:  # the resume point is from step 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        minimind.train("spo", callback=stop, **settings)
    resumed = minimind.train("spo", **settings, from_resume=1)
    same_but_for_time(whole.history, resumed.history)
    found = read_tensors(resumed.weight_path)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    again = read_tensors(whole.weight_path.parent / "checkpoints/spo_32_resume.pth")
    assert again["memory"]["tracker"] == last["memory"]["tracker"] and last["memory"]["path"] > 0
    other = minimind.train("spo", **{**settings, "seed": 7})
    assert other.history[0]["entropy"] != whole.history[0]["entropy"]


@pytest.mark.parametrize(
    "change", [{"beta": -1.0}, {"priority_epsilon": 0.0}, {"d_half": 0.0}, {"max_new_tokens": 0}]
)
def test_settings_that_cannot_work(settings, change):
    (name,) = change
    with pytest.raises(UserError, match=f"{name}={change[name]}"):
        minimind.train("spo", **{**settings, **change})


def test_one_answer_a_step_has_nothing_to_be_compared_with(settings):
    with pytest.raises(UserError, match=r"batch_size=1 and accumulation_steps=1"):
        minimind.train("spo", **{**settings, "batch_size": 1, "accumulation_steps": 1})
