"""GRPO: its two formulas against slow ones written out, the rollouts, and the run as a whole."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from helpers import SMALL, ends_now_and_then, write_lines

import minimind
from minimind import UserError
from minimind.checkpoint import read_tensors, save_weight
from minimind.config import stage_config
from minimind.evaluate import Answer, pass_at_k
from minimind.generate import sample_rollouts
from minimind.measures import MEASURES, THOUGHT, kl_per_token
from minimind.plots import reward_curve
from minimind.rewards import Rewards
from minimind.stages.common import frozen_copy, k3
from minimind.stages.grpo import GRPO, group_advantages, grpo_loss
from minimind.stages.rl import add_logps, prompt_ids, sample_answers, training_batches
from minimind.trainer import Run, make_optimizers, make_scaler, optimizer_step

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
    assert found[:5].tolist() == [0.0] * 5 and found[5:].abs().min() > 0.5
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


def test_k3_is_never_negative_and_exact_where_the_two_are_near():
    """e^d - d - 1 in float32 is rounding noise of either sign for d below a thousandth."""
    logps = -torch.rand(100_000) * 3
    difference = torch.randn(100_000) * 1e-4
    found = k3(logps, logps + difference)
    moved = (logps + difference).double() - logps.double()
    assert found.min() >= 0
    torch.testing.assert_close(found.double(), torch.expm1(moved) - moved, atol=1e-11, rtol=1e-3)


def test_k3_is_the_kl_on_average():
    policy, reference = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    estimates = k3(policy.log(), reference.log())
    exact = (policy * (policy / reference).log()).sum()
    assert estimates.min() >= 0
    torch.testing.assert_close((policy * estimates).sum(), exact)


def test_an_unknown_policy_loss_is_named():
    x = torch.zeros(2, 1)
    with pytest.raises(UserError, match=r"'ppo'.*cispo"):
        grpo_loss(x, x, x, torch.zeros(2), torch.ones(2, 1), 0.0, EPS, "ppo")


# The stage


def problems(count=6):
    return [
        {"conversations": [{"role": "user", "content": f"What is {i}+{2 * i}?" + " Say it." * (i % 3)},
                           {"role": "assistant", "content": ""}], "answer": str(3 * i)}
        for i in range(count)
    ]  # fmt: skip


def early(rows, texts):
    """A reward that can be learnt in a moment: how many of the answer's letters are a to m."""
    shares = [sum(c in "abcdefghijklm" for c in text) / max(len(text), 1) for text in texts]
    return torch.tensor(shares)


@pytest.fixture
def make_stage(small_model, tokenizer):
    def make(reward=early, **settings):
        defaults = {
            "num_generations": 4,
            "max_new_tokens": 6,
            "dtype": "float32",
            "device": "cpu",
            "log_interval": 1,
        }
        config = stage_config("grpo", **{**defaults, **settings})
        model = small_model(vocab_size=tokenizer.vocab_size, tie_word_embeddings=False)
        ends_now_and_then(model, tokenizer.eos_id)
        paid = Rewards([("mine", 1.0, reward)])
        return model, GRPO(config, tokenizer, problems(), frozen_copy(model), paid)

    return make


def gradient(model, stage, batches):
    """The gradient that the optimizer is given for a group of batches."""
    run = Run(model, make_optimizers(model, stage.config), make_scaler(stage.config, model.device))
    seen = {}
    run.optimizers[0].step = lambda: seen.update(
        {name: p.grad.clone() for name, p in model.named_parameters()}
    )
    loss, metrics, _ = optimizer_step(run, batches, stage, 1e-3, stage.config)
    return float(loss), metrics, seen


PROMPTS = [{"row": torch.tensor([0, 3])}, {"row": torch.tensor([5])}]


def test_a_rollout_becomes_batches_whose_labels_are_the_sampled_tokens(make_stage, tokenizer):
    model, stage = make_stage(num_iterations=2, beta=0.1)
    groups, figures = stage.rollout(model, PROMPTS, 0)
    assert len(groups) == 2 and groups[0] is groups[1]
    asked = {}
    for batch in groups[0]:
        for ids, labels, advantage in zip(
            batch["input_ids"], batch["labels"], batch["advantages"], strict=True
        ):
            start = int((labels != -100).nonzero()[0])
            said = labels[labels != -100]
            assert 1 <= len(said) <= 6 and ids[start : start + len(said)].tolist() == said.tolist()
            asked.setdefault(tokenizer.decode(ids[:start]), []).append(float(advantage))
    assert [q for i in (0, 3, 5) for q in asked if f"What is {i}+" in q] and len(asked) == 3
    assert all(len(group) == 4 and abs(sum(group)) < 1e-4 for group in asked.values())
    assert 1 <= figures["length"] <= 6 and figures["entropy"] > 0 and figures["dead_groups"] == 0


def test_before_the_first_update_the_ratio_is_one_and_the_kl_zero(make_stage):
    for dtype in ("float32", "bfloat16"):
        model, stage = make_stage(num_iterations=3, beta=0.1, dtype=dtype)
        groups, _ = stage.rollout(model, PROMPTS, 0)
        _, metrics, _ = gradient(model, stage, groups[0])
        assert metrics["kl"] == 0 and metrics["clip_fraction"] == 0
        for batch in groups[0]:
            torch.testing.assert_close(batch["old_logps"], batch["ref_logps"], atol=0, rtol=0)


def only_two(rows, texts):
    """A reward that tells the answers of two of the three problems apart."""
    return early(rows, texts) * torch.tensor([row["answer"] != "9" for row in rows])


def test_groups_without_a_difference_are_left_out_only_where_they_have_no_gradient(make_stage):
    model, stage = make_stage(only_two, beta=0.0)
    short, figures = stage.rollout(model, PROMPTS, 0)
    assert figures["dead_groups"] == pytest.approx(1 / 3)
    assert sum(len(batch["input_ids"]) for batch in short[0]) == 8
    loss, _, fast = gradient(model, stage, short[0])
    model, whole = make_stage(only_two, beta=1e-30)
    model.load_state_dict(stage.reference.state_dict())
    long, _ = whole.rollout(model, PROMPTS, 0)
    assert sum(len(batch["input_ids"]) for batch in long[0]) == 12
    full_loss, _, full = gradient(model, whole, long[0])
    assert loss == pytest.approx(full_loss, abs=1e-6)
    for name, expected in full.items():
        torch.testing.assert_close(fast[name], expected, atol=1e-6, rtol=1e-4)


def test_when_all_rewards_are_equal_nothing_is_learnt(make_stage):
    """Not even by rounding: AdamW makes a whole step of the smallest gradient."""
    model, stage = make_stage(
        lambda rows, texts: torch.full((len(rows),), 0.7), beta=0.0, weight_decay=0.0,
        num_generations=5, max_new_tokens=40,
    )  # fmt: skip
    run = Run(model, make_optimizers(model, stage.config), make_scaler(stage.config, model.device))
    for step in range(3):
        groups, figures = stage.rollout(model, PROMPTS, step)
        assert figures["truncated"] == 0 and figures["dead_groups"] == 1
        loss, _, _ = optimizer_step(run, groups[0], stage, 1e-3, stage.config)
        assert float(loss) == pytest.approx(0, abs=1e-6)
    for name, start in stage.reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], start), name


def test_the_kl_that_is_logged_is_that_of_the_answers_trained_on(make_stage):
    model, stage = make_stage(only_two, beta=0.0)
    with torch.no_grad():
        stage.reference.lm_head.weight[:20] *= 1.5
    groups, figures = stage.rollout(model, PROMPTS, 0)
    assert figures["dead_groups"] == pytest.approx(1 / 3)
    _, metrics, _ = gradient(model, stage, groups[0])
    found = []
    for batch in groups[0]:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            said = labels[1:] != -100
            now, ref = (
                m(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[said]
                for m in (model, stage.reference)
            )
            found.append(float(k3(now, ref).detach().mean()))
    assert len(found) == 8 and float(metrics["kl"]) == pytest.approx(sum(found) / 8, rel=1e-4)
    assert metrics["kl"] > 1e-4


@pytest.mark.parametrize(
    "values, words", [([1.0], "1.* values for 12"), ([math.nan] * 12, "answer 0 is nan")]
)
def test_a_reward_of_the_wrong_length_or_nan_is_refused(make_stage, values, words):
    model, stage = make_stage(lambda rows, texts: values)
    with pytest.raises(UserError, match=words):
        stage.rollout(model, PROMPTS, 0)


def test_answers_are_sampled_in_the_precision_that_is_trained(make_stage):
    for dtype, bound in (("float32", 1e-4), ("bfloat16", 0.15)):
        model, stage = make_stage(dtype=dtype, num_generations=8)
        answers = sample_answers(
            model, problems(), 8, stage.config, stage.tokenizer, stage.reward, 0
        )
        batches = training_batches(answers, {"logps": answers.logps}, stage.tokenizer.pad_id)
        add_logps("fresh", model, batches, stage.config)
        add_logps("float32", model, batches, stage_config("grpo", dtype="float32", device="cpu"))
        sampled = [batch["logps"][batch["logps"] < 0] for batch in batches]
        fresh, exact = (
            [batch[name][batch["labels"][:, 1:] != -100] for batch in batches]
            for name in ("fresh", "float32")
        )
        off, off_exact = (torch.cat([a - b for a, b in zip(sampled, other, strict=True)]).abs()
                          for other in (fresh, exact))  # fmt: skip
        assert off.max() < bound
        assert off.mean() < off_exact.mean() or dtype == "float32"


def test_an_answer_that_never_ends_is_cut_counted_and_earns_nothing(make_stage, tokenizer):
    model, stage = make_stage(lambda rows, texts: torch.ones(len(rows)), num_generations=16)
    groups, figures = stage.rollout(model, PROMPTS, 1)
    assert 0 < figures["truncated"] < 1
    assert figures["reward"] == pytest.approx(1 - figures["truncated"])
    for batch in groups[0]:
        ended = (batch["labels"] == tokenizer.eos_id).any(1)
        assert (batch["advantages"][ended] >= 0).all() and (batch["advantages"][~ended] <= 0).all()
    assert any(batch["advantages"].any() for batch in groups[0])


def test_no_cut_answer_is_worth_more_than_one_that_ended(make_stage):
    """A learned reward may be negative for all that ended: 0 for the cut ones would be a prize."""
    model, stage = make_stage(num_generations=16)
    stage.reward = Rewards([("reward_model", 1.0, lambda rows, texts: [-2.0] * len(rows))])
    rows = [{k: v for k, v in row.items() if k != "answer"} for row in problems()]
    answers = sample_answers(model, rows, 16, stage.config, stage.tokenizer, stage.reward, 1)
    assert 0 < answers.truncated.float().mean() < 1
    assert answers.rewards[answers.truncated].unique().tolist() == [-3]
    assert answers.rewards[~answers.truncated].unique().tolist() == [-2]
    assert answers.unit_rewards[answers.truncated].unique().tolist() == [0]


@pytest.mark.parametrize(
    "settings", [{"beta": 0.0}, {"beta": 0.02, "num_iterations": 2, "policy_loss": "cispo"}]
)
def test_the_reward_rises(make_stage, settings):
    model, stage = make_stage(lambda rows, texts: torch.tensor([float(len(t) < 9) for t in texts]),
                              num_generations=8, **settings)  # fmt: skip
    run = Run(model, make_optimizers(model, stage.config), make_scaler(stage.config, model.device))
    rewards = []
    for step in range(12):
        groups, figures = stage.rollout(model, PROMPTS, step)
        rewards.append(figures["reward"])
        for group in groups:
            optimizer_step(run, group, stage, 1e-3, stage.config)
    assert rewards[0] < 0.8 and sum(rewards[-4:]) / 4 > 0.95, rewards


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
    small = {**SMALL, "max_seq_len": 64, "learning_rate": 1e-4, "batch_size": 2}
    return {**small, "num_generations": 3, "max_new_tokens": 5, "out_dir": str(tmp_path / "out"),
            "data_path": write_lines(tmp_path / "grpo.jsonl", problems()), "reasoning": 1}  # fmt: skip


def same_but_for_time(one, other):
    clocks = {"tokens_per_second": 0, "rollout_share": 0}
    assert [{**row, **clocks} for row in one] == [{**row, **clocks} for row in other]


@pytest.fixture
def some_are_right(monkeypatch):
    """Rewards that differ inside a group, and depend on the sample."""

    def letters(rows, texts):
        return torch.tensor([len(text) % 3 / 2 for text in texts])

    paid = Rewards([("letters", 1.0, letters)])
    monkeypatch.setattr("minimind.stages.grpo.make_reward", lambda *_: paid)


def test_a_run_logs_what_one_wants_to_know_and_repeats_itself_bit_for_bit(
    settings, some_are_right, tmp_path, capsys
):
    result = minimind.train("grpo", **settings)
    assert result.weight_path.name == "grpo_32.pth" and result.metrics["steps"] == 3
    for row in result.history:
        assert {"reward", "accuracy", "kl", "clip_fraction", "entropy", "length", "truncated",
                "dead_groups", "rollout_share"} <= set(row)  # fmt: skip
        assert 0 < row["rollout_share"] < 1 and row["dead_groups"] < 1 and row["grad_norm"] > 0
        assert 0 < row["reward"] < 1
    assert "What is" in capsys.readouterr().out
    again = minimind.train("grpo", **{**settings, "out_dir": str(tmp_path / "out2"),
                                      "from_weight": str(tmp_path / "out/reason_32.pth")})  # fmt: skip
    same_but_for_time(result.history, again.history)
    other = minimind.train("grpo", **{**settings, "seed": 7})
    assert other.history[0]["entropy"] != result.history[0]["entropy"]


def test_a_run_that_was_cut_off_in_the_middle_goes_on_bit_for_bit(settings, some_are_right):
    settings = {**settings, "save_interval": 2, "beta": 0.1, "num_iterations": 2}
    whole = minimind.train("grpo", **settings)
    assert all(row["dead_groups"] < 1 for row in whole.history) and whole.history[-1]["kl"] > 0
    wanted = read_tensors(whole.weight_path)

    def stop(step, model):
        if step == 3:  # the resume point is from step 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        minimind.train("grpo", callback=stop, **settings)
    resumed = minimind.train("grpo", **settings, from_resume=1)
    same_but_for_time(whole.history, resumed.history)
    found = read_tensors(resumed.weight_path)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


ANSWERED = {"role": "assistant", "content": "It is 4."}
QUESTION = {"role": "user", "content": "What is 2+2?"}
EMPTY = {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    "row, words",
    [
        ({"conversations": [QUESTION, ANSWERED]}, r"line 7: its last turn must be an empty assistant turn.*It is 4"),
        ({"conversations": [QUESTION]}, r"line 7: .*'assistant'"),
        ({"conversations": [QUESTION, EMPTY, QUESTION]}, r"line 7: its last turn must be an empty assistant turn.*2\+2"),
        ({"conversations": [EMPTY]}, r"line 7: its last turn.*after a question"),
        ({"conversations": [QUESTION, EMPTY], "answer": 4}, r'line 7: "answer" must be a string; it is 4'),
        ({"conversations": [{**QUESTION, "content": "na " * 40000}, EMPTY]},
         r"line 7: its prompt has \d+ tokens and leaves no room for max_new_tokens=5.*32768 positions"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_answered(settings, row, words):
    write_lines(Path(settings["data_path"]), [*problems(), row])
    with pytest.raises(UserError, match=words):
        minimind.train("grpo", **settings)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_generations": 1}, "num_generations=1.*at least 2.*SPO"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"beta": -0.1}, r"beta=-0\.1"),
        ({"beta": math.nan}, "beta=nan"),
        ({"clip_eps": 0.0}, r"clip_eps=0\.0"),
        ({"seed": -1}, "seed=-1"),
        ({"policy_loss": "clpi"}, "Unknown policy_loss 'clpi'. Did you mean 'clip'"),
        ({"max_seq_len": 5}, "Every prompt of .* is longer than max_seq_len=5"),
    ],
)
def test_settings_that_cannot_work(settings, change, words):
    with pytest.raises(UserError, match=words):
        minimind.train("grpo", **{**settings, **change})


def test_long_prompts_are_left_out_whole_and_counted(settings, capsys):
    result = minimind.train("grpo", **{**settings, "max_seq_len": 21})
    left_out = result.metrics["prompt longer than max_seq_len=21, left out"]
    assert 0 < left_out < 6 and f"{left_out} x prompt longer" in capsys.readouterr().out
    assert result.metrics["steps"] == math.ceil((6 - left_out) / 4)


def test_a_reward_model_that_has_nothing_to_judge_is_named(settings, capsys):
    minimind.train("grpo", **{**settings, "reward_model_path": "some/judge", "epochs": 1})
    assert (
        'Warning: every problem has an "answer", so some/judge judges nothing.'
        in capsys.readouterr().out
    )


# What is measured


def test_pass_at_k_counts_all_choices():
    for samples, right, k in [(5, 2, 3), (8, 0, 4), (6, 5, 2), (7, 1, 7)]:
        verdicts = [i < right for i in range(samples)]
        choices = list(itertools.combinations(verdicts, k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_the_kl_is_the_sum_over_the_vocabulary_at_every_sampled_token(small_model, tokenizer):
    model, other = (small_model(vocab_size=tokenizer.vocab_size, num_hidden_layers=1) for _ in "12")
    rows = problems(3)
    assert kl_per_token(model, model, tokenizer, rows) == pytest.approx(0, abs=1e-6)
    sampled = sample_rollouts(
        model, [prompt_ids(row, tokenizer) for row in rows], 1, THOUGHT, tokenizer.eos_id, seed=0
    )
    total = tokens = 0
    with torch.no_grad():
        for prompt, said in zip(sampled.prompt_ids, sampled.completions, strict=True):
            for t in range(len(said)):
                ids = torch.tensor([prompt + said[:t]])
                p, q = (m(ids)[0, -1].softmax(-1) for m in (model, other))
                total, tokens = total + float((p * (p / q).log()).sum()), tokens + 1
    assert kl_per_token(model, other, tokenizer, rows) == pytest.approx(total / tokens, rel=1e-4)


def test_the_measures_tell_hard_from_easy_and_stay_within_bounds(small_model, tokenizer):
    model = small_model(vocab_size=tokenizer.vocab_size, num_hidden_layers=1)
    measures, found = MEASURES["grpo"](model, tokenizer, 7)
    assert set(measures) == {"sampled_hard", "greedy_hard", "pass_at_8_hard", "sampled_easy",
                             "greedy_easy", "tokens_hard"}  # fmt: skip
    easy, hard = (measures[f"greedy_{name}"].held_out_examples for name in ("easy", "hard"))
    assert easy + hard == len(found) and min(easy, hard) > 0
    assert all(0 <= m.value <= 1 for name, m in measures.items() if name != "tokens_hard")


def test_an_answer_is_right_by_what_stands_in_its_tags():
    assert Answer("q", "4", "<think>a4;</think><answer>4</answer>").right
    assert not Answer("q", "4", "<think>4</think><answer>5</answer>").right
    assert Answer("q", "It is 4.", " It is 4.\n").right


def test_the_picture_of_a_run_is_its_reward():
    history = [
        {"step": s, "reward": s / 9, "accuracy": s / 10, "kl": s / 50, "loss": 0.0}
        for s in (1, 5, 9)
    ]
    left, right = reward_curve(history, "grpo").axes
    assert [line.get_label() for line in left.lines] == ["reward", "accuracy"]
    assert list(left.lines[0].get_ydata()) == [1 / 9, 5 / 9, 1.0]
    assert list(right.lines[0].get_ydata()) == [0.02, 0.1, 0.18]
