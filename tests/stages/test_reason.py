import json
import math

import pytest
import torch
from helpers import SMALL, write_lines

from minimind import Tokenizer, UserError, train
from minimind.comparisons import question_and_answer
from minimind.config import data_samples, stage_config
from minimind.evaluate import Answer
from minimind.measures import reasoning_measures
from minimind.stages.pretrain import next_token_loss
from minimind.stages.reason import (
    check_reasoning,
    read_reasoning,
    reason_task,
    split_thought,
    tag_weights,
    weighted_token_loss,
)
from minimind.tokenizer import TAGS

TOKENIZER = str(data_samples("tokenizer.json"))
GOOD = "<think>3+4=7;</think><answer>7</answer>"


def row(answer, question="What is 3+4?"):
    return question_and_answer(question, answer, "2")


def rows(count=24):
    return [row(f"<think>{'3+4=7;' * (1 + i % 5)}</think><answer>{i % 10}</answer>",
                "What is " + "3+4" * (1 + i % 3)) for i in range(count)]  # fmt: skip


def drawn(B=3, T=7, V=11):
    """Logits, and labels of unequal number per row in which 3 and 4 are tags."""
    torch.manual_seed(1)
    labels = torch.tensor([[-100, -100, 3, 5, 4, 2, -100], [3, 4, 9, 9, 3, 3, 2], [-100] * 6 + [4]])
    assert labels.shape == (B, T)
    return torch.randn(B, T, V, requires_grad=True), labels


# The losses


def test_only_tags_of_the_assistant_are_weighted():
    labels = drawn()[1]
    expected = [[0, 0, 10, 1, 10, 1, 0], [10, 10, 1, 1, 10, 10, 1], [0] * 6 + [10]]
    assert tag_weights(labels, [3, 4]).tolist() == expected
    assert tag_weights(labels, {"<think>": 4}, 2.5)[0].tolist() == [0, 0, 1, 1, 2.5, 1, 0]
    assert tag_weights(labels, [3, 4], 1.0).tolist() == (labels != -100).float().tolist()


def test_both_normalizers_against_a_loop():
    logits, labels = drawn()
    weights = tag_weights(labels, [3, 4], 10.0)
    total = count = weight_sum = 0.0
    for b in range(3):
        for t in range(6):
            label = labels[b, t + 1]
            if label != -100:
                w = 10.0 if label in (3, 4) else 1.0
                total -= w * math.log(logits[b, t].detach().softmax(-1)[label])
                count, weight_sum = count + 1, weight_sum + w
    assert (count, weight_sum) == (11, 65)
    by_tokens = weighted_token_loss(logits, labels, weights)
    by_weights = weighted_token_loss(logits, labels, weights, "weights")
    assert by_tokens.item() == pytest.approx(total / count, rel=1e-5)
    assert by_weights.item() == pytest.approx(total / weight_sum, rel=1e-5)


def test_small_weights_are_still_a_mean():
    logits, labels = drawn()
    tiny = tag_weights(labels, [3, 4], 1.0) * 1e-3
    plain = next_token_loss(logits, labels)
    assert torch.allclose(weighted_token_loss(logits, labels, tiny, "weights"), plain)


@pytest.mark.parametrize("normalizer", ["tokens", "weights"])
def test_weights_of_one_are_plain_sft_and_no_label_is_zero_with_a_gradient(normalizer):
    logits, labels = drawn()
    ones = tag_weights(labels, [3, 4], 1.0)
    assert torch.allclose(
        weighted_token_loss(logits, labels, ones, normalizer), next_token_loss(logits, labels)
    )
    nothing = torch.full_like(labels, -100)
    loss = weighted_token_loss(logits, nothing, tag_weights(nothing, [3, 4]), normalizer)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_the_gradient_at_a_tag_is_ten_times_as_large():
    logits, labels = drawn()
    plain, heavy = (
        torch.autograd.grad(
            weighted_token_loss(logits, labels, tag_weights(labels, [3], w)), logits
        )[0]
        for w in (1.0, 10.0)
    )
    factor = torch.where(labels[:, 1:] == 3, 10.0, 1.0)[..., None]
    assert torch.allclose(heavy[:, :-1], plain[:, :-1] * factor, atol=1e-7)


def test_an_unknown_normalizer_is_named():
    logits, labels = drawn()
    with pytest.raises(UserError, match=r"normalizer 'token'\. Did you mean 'tokens'"):
        weighted_token_loss(logits, labels, torch.ones(3, 7), "token")


@pytest.mark.parametrize("normalizer", ["tokens", "weights"])
def test_micro_batches_have_the_gradient_of_the_whole(tokenizer, small_model, here, normalizer):
    """Rows of unequal length, weighted by `count`, as the loop does it."""
    config = stage_config("reason", "tiny", data_path=write_lines(here / "r.jsonl", rows()),
                          eval_data_path="", normalizer=normalizer)  # fmt: skip
    model = small_model(vocab_size=tokenizer.vocab_size, num_hidden_layers=1)
    task = reason_task(config, model, tokenizer)
    train = list(task.train)
    parts = [train[:1], train[1:7], train[7:9]]
    whole = task.collate(train[:9])

    def gradient(batches):
        model.zero_grad()
        total = sum(task.count(batch) for batch in batches)
        for batch in batches:
            (task.loss(model, batch)[0] * (task.count(batch) / total)).backward()
        return model.model.embed_tokens.weight.grad.clone()

    expected = gradient([whole])
    assert torch.allclose(gradient([task.collate(part) for part in parts]), expected, atol=1e-6)


def test_logged_figures_do_not_depend_on_the_weight(tokenizer, small_model, here):
    data = write_lines(here / "r.jsonl", rows())
    model = small_model(vocab_size=tokenizer.vocab_size, num_hidden_layers=1)
    found = {}
    for weight in (1.0, 10.0):
        config = stage_config("reason", "tiny", data_path=data, tag_weight=weight)
        task = reason_task(config, model, tokenizer)
        batch = task.collate(list(task.train)[:5])
        found[weight] = (*task.loss(model, batch)[1].values(), task.loss(model, batch)[0])
    assert found[1.0][:2] == found[10.0][:2]
    assert torch.allclose(found[1.0][0], found[1.0][2]) and found[10.0][2] > 2 * found[1.0][2]
    logits, labels = model(batch["input_ids"]), batch["labels"]
    is_tag = torch.isin(labels, torch.tensor(list(tokenizer.tag_ids.values())))
    only_tags = labels.masked_fill(~is_tag, -100)
    assert torch.allclose(found[1.0][1], next_token_loss(logits, only_tags))


# The rows


def test_tags_in_the_prompt_are_read_and_not_trained(tokenizer, here):
    asked = write_lines(here / "r.jsonl", [row(GOOD, "What does <think> in </answer> mean?")])
    examples, faults = read_reasoning(asked, tokenizer, 99)
    weights = tag_weights(torch.tensor([examples[0]["labels"]]), tokenizer.tag_ids)
    assert (weights == 10).sum() == 4 and not faults
    assert sum(i in tokenizer.tag_ids.values() for i in examples[0]["input_ids"]) == 6


@pytest.mark.parametrize(
    "answer, words",
    [
        ("7", "has <think> 0 times"),
        ("<think>3+4=7;</think><answer>7", "has </answer> 0 times"),
        ("<think>a</think><think>b</think><answer>7</answer>", "has <think> 2 times"),
        ("<answer>7</answer><think>3+4=7;</think>", "order <answer> </answer> <think> </think>"),
        ("<think><answer>7</answer></think>", "order <think> <answer> </answer> </think>"),
        ("<think>3+4=7;</think><answer> \n</answer>", "empty answer"),
        ("Well: <think>3+4=7;</think><answer>7</answer>", "text outside the tags"),
        ("<think>3+4=7;</think>so<answer>7</answer>", "text outside the tags"),
    ],
)
def test_a_row_of_another_form_is_named_with_its_line(tokenizer, here, answer, words):
    data = write_lines(here / "r.jsonl", [row(GOOD), row(answer)])
    with pytest.raises(UserError, match=rf"r\.jsonl, line 2: message 2 .*{words}") as error:
        read_reasoning(data, tokenizer, 99)
    assert "<think>…</think><answer>…</answer>" in str(error.value)


def test_every_answer_of_a_conversation_is_checked():
    turns = row(GOOD)["conversations"] * 2
    assert check_reasoning({"conversations": turns}) is None
    turns[1] = {"role": "assistant", "content": "7"}
    assert check_reasoning({"conversations": turns}).startswith("message 2 ")


def test_line_breaks_and_an_empty_thought_are_fine():
    assert check_reasoning(row("<think>\nso\n</think>\n<answer>\n7\n</answer>\n")) is None
    assert split_thought("<think>\n</think>\n<answer>\n7\n</answer>") == ("", "7")
    assert split_thought("<answer>7</answer>") is None


def test_rows_cut_are_counted_and_rows_without_a_label_left_out(tokenizer, here, capsys):
    prompt = len(tokenizer.encode_chat(row(GOOD)["conversations"][:1], True))
    long = "<think>" + "3+4=7;" * 9 + "</think><answer>7</answer>"
    some = [row(GOOD), row(long), row(long), row(GOOD, "why? " * 40)]
    room = prompt + len(tokenizer.encode(GOOD)) + 1  # GOOD fits, with its <|im_end|> and no more
    data = write_lines(here / "r.jsonl", some)
    result = train("reason", **SMALL | {"max_seq_len": room, "epochs": 1}, data_path=data,
                   from_weight="none", tokenizer_path=TOKENIZER)  # fmt: skip
    cut = f"answer cut at max_seq_len={room}: its end is not learnt"
    left_out = f"row left out: its prompt fills max_seq_len={room}"
    assert result.metrics[cut] == 2 and result.metrics[left_out] == 1
    assert f"Warning: 2 x {cut}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no row is left.*Raise max_seq_len"):
        read_reasoning(data, tokenizer, prompt)


# The stage


def test_a_tokenizer_without_the_tags_is_refused(tokenizer, here):
    content = json.loads(tokenizer.to_json())
    tags = {token["content"] for token in content["added_tokens"]} & set(TAGS)
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in tags]
    for tag in tags:
        content["model"]["vocab"][f"was {tag}"] = content["model"]["vocab"].pop(tag)
    Tokenizer.from_json(json.dumps(content)).save(here / "old.json")
    data = write_lines(here / "r.jsonl", rows())
    with pytest.raises(UserError, match="not a single token of this tokenizer"):
        train("reason", data_path=data, from_weight="none", tokenizer_path="old.json", **SMALL)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"tag_weight": 0}, "tag_weight=0 must be"),
        ({"tag_weight": -10.0}, "tag_weight=-10.0 must be"),
        ({"tag_weight": float("nan")}, "tag_weight=nan must be"),
        ({"normalizer": "weight"}, "Unknown normalizer 'weight'. Did you mean 'weights'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        stage_config("reason", **settings)


def test_the_guides_settings():
    config = stage_config("reason")
    assert (config.tag_weight, config.learning_rate, config.batch_size) == (10.0, 1e-6, 8)
    assert (config.max_seq_len, config.from_weight, config.normalizer) == (720, "dpo", "tokens")


def test_a_tiny_run_learns_the_form_and_logs_it(here):
    data = write_lines(here / "r.jsonl", rows())
    result = train("reason", data_path=data, from_weight="none", tokenizer_path=TOKENIZER,
                   **SMALL | {"epochs": 12, "max_seq_len": 80, "learning_rate": 1e-2})  # fmt: skip
    assert result.weight_path.name == "reason_32.pth"
    first, last = result.history[0], result.history[-1]
    assert last["tag_nll"] < 0.5 * first["tag_nll"] and last["nll"] < 0.5 * first["nll"]


# The measures


@pytest.mark.parametrize(
    "expected, answer, right",
    [
        (GOOD, GOOD + "\n", True),
        (GOOD, "<think>3+4=8;</think><answer>7</answer>", False),
        (GOOD, "7", False),
        ("7", GOOD, True),  # problems of reinforcement learning expect the bare answer
        ("7", "<answer></answer>", False),
        ("7", " 7", True),
    ],
)
def test_an_answer_is_right_with_its_thought_if_a_thought_is_expected(expected, answer, right):
    assert Answer("q", expected, answer).right == right


def test_measures_tell_form_number_and_thought_apart(tokenizer):
    right = "<think>a3;b+4=7;c*2=4;</think><answer>4</answer>"
    said = {
        right: (1, 1, 1),
        "<think>a3;b+4=8;c*2=4;</think><answer>4</answer>": (
            1,
            1,
            0,
        ),  # wrong thought, by luck right
        "<think>a3;b+4=7;c*2=4;</think><answer>5</answer>": (1, 0, 1),
        "<answer>4</answer>": (0, 1, 0),
        "<think>a3;b+4=7;c*2=4;</think><answer>4": (0, 0, 0),
        "4": (0, 0, 0),
    }
    for text, expected in said.items():
        found = reasoning_measures([Answer("q", right, text, "2")], tokenizer)
        names = ("format_rate", "answer", "right_thought")
        assert tuple(found[name].value for name in names) == expected, text
    found = reasoning_measures([Answer("q", right, text, "2") for text in said]
                               + [Answer("q", right, right, "7")], tokenizer)  # fmt: skip
    assert found["answer"].value == 3 / 6 and found["answer_7"].value == 1
    assert found["format_rate"].value == 4 / 7 and found["format_rate"].held_out_examples == 7
    size = len(tokenizer.encode("a3;b+4=7;c*2=4;"))
    assert found["thought_tokens_off"].value == pytest.approx(3 * size / 7)


def test_ordinary_chats_are_mixed_in_without_a_weight_of_their_own(tokenizer, small_model, here):
    """`chat_share` rows of `chat_path` for each reasoning row, the same ones for the same seed."""
    data = write_lines(here / "r.jsonl", rows())
    said = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello, you."}]
    chats = write_lines(here / "c.jsonl", [{"conversations": said}] * 50)
    model = small_model(vocab_size=tokenizer.vocab_size, num_hidden_layers=1)

    def trained(**settings):
        config = stage_config("reason", "tiny", data_path=data, eval_data_path="", **settings)
        return list(reason_task(config, model, tokenizer).train)

    alone = trained(chat_path="")
    mixed = trained(chat_path=chats, chat_share=0.5)
    assert mixed[: len(alone)] == alone == trained(chat_path=chats, chat_share=0)
    assert len(mixed) == len(alone) + round(len(alone) / 2)
    labels = torch.tensor([mixed[-1]["labels"]])
    assert set(tag_weights(labels, tokenizer.tag_ids).unique().tolist()) == {0.0, 1.0}
    with pytest.raises(UserError, match="chat_share=-1"):
        trained(chat_share=-1)
