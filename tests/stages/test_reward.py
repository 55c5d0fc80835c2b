"""The reward model: its loss, where it reads the score, and that it comes back from its file."""

import math

import pytest
import torch
from helpers import SMALL, write_lines

from minimind import UserError, load, train
from minimind.config import data_samples
from minimind.stages.dpo import encode_pair, pad_pairs
from minimind.stages.reward import (
    add_score,
    bradley_terry_loss,
    heldout_scores,
    pair_accuracy,
    pair_scores,
    score_conversations,
)

PAIRS = [
    {"prompt": f"Number {i}?", "chosen": "yes " * (i % 4 + 1) + "thanks", "rejected": "no " * (i % 3 + 1)}
    for i in range(40)
]  # fmt: skip


def judge(model):
    add_score(model).score.weight.data.normal_()
    return model


def talks(row):
    return [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            for side in ("chosen", "rejected")]  # fmt: skip


def test_the_loss_is_that_of_bradley_and_terry():
    chosen, rejected = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    expected = [math.log1p(math.exp(-d)) for d in (1.0, -3.0, 0.0)]
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(sum(expected) / 3)
    shifted = bradley_terry_loss(chosen + 5, rejected + 5)
    assert shifted.item() == pytest.approx(sum(expected) / 3, rel=1e-5)  # differences alone count
    centred = bradley_terry_loss(chosen, rejected, centre=0.1)
    assert centred.item() == pytest.approx(sum(expected) / 3 + 0.1 * (1 + 1 + 1) / 3)


def test_a_tie_is_half_right():
    assert pair_accuracy(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])) == 0.5


@torch.no_grad()
def test_the_score_is_read_at_the_end_of_the_answer(small_model, tokenizer):
    model = judge(small_model(vocab_size=tokenizer.vocab_size))
    pairs = [encode_pair(tokenizer, row, 64) for row in PAIRS[:5]]
    chosen, rejected = pair_scores(model, pad_pairs(pairs, tokenizer.pad_id))
    for i, row in enumerate(PAIRS[:5]):
        for side, score in zip(talks(row), (chosen[i], rejected[i]), strict=True):
            ids = tokenizer.encode_chat(side)[:-1]
            assert ids[-1] == tokenizer.eos_id
            alone = model.score(model.model(torch.tensor([ids]))[0, -1])
            torch.testing.assert_close(score, alone[0], atol=1e-5, rtol=0)
    again = score_conversations(model, tokenizer, [talks(row)[0] for row in PAIRS[:5]])
    torch.testing.assert_close(again, chosen, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    data = write_lines(folder / "pairs.jsonl", PAIRS)
    settings = {**SMALL, "learning_rate": 3e-3, "epochs": 4, "accumulation_steps": 1}
    return train("reward", data_path=data, eval_data_path=data, from_weight="none", out_dir=str(folder),
                 tokenizer_path=str(data_samples("tokenizer.json")), **settings)  # fmt: skip


def test_training_starts_at_ln_2_and_learns_the_preference(trained):
    assert trained.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert trained.history[0]["accuracy"] == 0.5
    assert trained.metrics["heldout_loss"] < 0.2
    pairs = [encode_pair(trained.tokenizer, row, 64) for row in PAIRS]
    chosen, rejected = heldout_scores(trained.model, pairs, trained.tokenizer.pad_id)
    assert pair_accuracy(chosen, rejected) == 1
    assert abs(float((chosen + rejected).mean())) < 1  # centred, so that clipping at 3 spares them


def test_the_file_gives_the_same_scores_back(trained):
    conversations = [talk for row in PAIRS[:6] for talk in talks(row)]
    model, tokenizer = load(str(trained.weight_path))
    expected = score_conversations(trained.model, trained.tokenizer, conversations)
    assert torch.equal(score_conversations(model, tokenizer, conversations), expected)
    assert expected.unique().numel() > 6


def test_a_language_model_is_no_judge(small_model, tokenizer):
    with pytest.raises(UserError, match="minimind reward"):
        score_conversations(
            small_model(vocab_size=tokenizer.vocab_size), tokenizer, [talks(PAIRS[0])[0]]
        )


def test_a_conversation_that_does_not_fit_is_refused(small_model, tokenizer):
    model = judge(small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=8))
    with pytest.raises(UserError, match="exceeds 8 positions"):
        score_conversations(model, tokenizer, [talks(PAIRS[0])[0]])


RL = {
    "tokenizer_path": str(data_samples("tokenizer.json")),
    "max_new_tokens": 6,
    "from_weight": "none",
    "epochs": 0.5,
    "accumulation_steps": 1,
    "max_seq_len": 40,
}


def open_rows(folder):
    return write_lines(folder / "open.jsonl", [
        {"conversations": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": ""}]}
        for i in range(8)
    ])  # fmt: skip


@pytest.mark.parametrize("stage", ["grpo", "spo"])
def test_problems_without_an_answer_are_judged_by_it(stage, trained, tmp_path):
    settings = {**SMALL, **RL, "reward_model_path": str(trained.weight_path)}
    result = train(stage, data_path=open_rows(tmp_path), out_dir=str(tmp_path), **settings)
    row = result.history[-1]
    assert {"reward_reward_model", "reward_tags", "reward_format"} <= set(row)
    assert -3 <= row["reward_reward_model"] <= 3 and row["reward_reward_model"] != 0


def test_without_a_judge_the_error_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="minimind reward"):
        train("grpo", data_path=open_rows(tmp_path), out_dir=str(tmp_path), **{**SMALL, **RL})


def test_a_missing_judge_is_named(tmp_path):
    with pytest.raises(UserError, match=r"reward_model_path=.*nowhere"):
        train("grpo", data_path=open_rows(tmp_path), out_dir=str(tmp_path),
              **{**SMALL, **RL, "reward_model_path": str(tmp_path / "nowhere")})  # fmt: skip
