"""Rewards on hand-written strings, and reward models in folders that the test writes."""

import json
import math
from functools import partial

import pytest
import torch
import transformers

from minimind import UserError
from minimind.rewards import (
    REWARDS,
    SPANS,
    LearnedReward,
    Rewards,
    answer_of,
    exact,
    folder_scorer,
    format_reward,
    length_reward,
    repetition_reward,
    tag_count_reward,
)

GOOD = "<think>a1;b+2=3;</think><answer>3</answer>"


def row(question="Chain: a1;b+2;", **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
    return {"conversations": turns, **more}


@pytest.mark.parametrize(
    "text, right, expected",
    [(GOOD, "3", 1), (GOOD, " 3\n", 1), (GOOD, "4", 0), (GOOD, "", 0), ("<answer>\n 3 </answer>", "3", 1), ("3", "3", 0),
     ("<answer>13</answer>", "3", 0), ("<answer>3", "3", 0), ("<answer></answer>", "", 1),
     ("<answer>4</answer><answer>3</answer>", "3", 0)],
)  # fmt: skip
def test_exact(text, right, expected):
    assert exact(text, right) == expected


def test_several_answers_are_no_lottery():
    assert answer_of("<answer>1</answer><answer>2</answer>") == "1"  # the first counts, always
    assert answer_of("no tags") is None


@pytest.mark.parametrize(
    "text, form, tags",
    [(GOOD, 0.5, 1.0), ("\n" + GOOD + "\n", 0.5, 1.0), (GOOD + " and more", 0, 1.0), (GOOD + GOOD, 0, 0),
     ("<answer>3</answer><think>a</think>", 0, 1.0), ("<think>a</think><answer>3", 0, 0.75),
     ("<think><think>a</think><answer>3</answer>", 0, 0.75), ("</think></answer>", 0, 0.5), ("", 0, 0),
     ("<think>one\ntwo</think>\n<answer>3</answer>", 0.5, 1.0), ("3", 0, 0)],
)  # fmt: skip
def test_format_and_tag_counts(text, form, tags):
    assert (format_reward(text), tag_count_reward(text)) == (form, tags)


def test_length_and_repetition_cost():
    assert length_reward("") == 0 and length_reward("x" * 50) == -0.25
    assert length_reward("x" * 201) == length_reward("x" * 9999) == -1
    assert repetition_reward("") == repetition_reward("a b") == repetition_reward(GOOD) == 0
    assert repetition_reward("abcdabcd", n=4) == pytest.approx(-1 / 5)  # 5 of them, 4 different
    assert repetition_reward("ha " * 100) == pytest.approx(3 / 293 - 1)


@pytest.mark.parametrize("text", ["b+2=6;" * 50, "今天天气很好。" * 30])
def test_what_has_no_spaces_can_repeat_itself_too(text):
    assert repetition_reward(text) < -0.9


def test_rewards_add_up_by_name_and_weight():
    rewards = Rewards([("exact", 2.0), ("format", 1.0), ("length", 0.5)])
    total, parts = rewards([row(answer="3"), row(answer="4"), row()], [GOOD, GOOD, "3"])
    assert parts["exact"].tolist() == [1, 0, 0] and parts["format"].tolist() == [0.5, 0.5, 0]
    cost = [0.5 * length_reward(text) for text in (GOOD, GOOD, "3")]
    torch.testing.assert_close(total, torch.tensor([2.5 + cost[0], 0.5 + cost[1], cost[2]]))
    low, high = rewards.spans([row(answer="3"), row()])
    assert low.tolist() == [-0.5, -0.5] and high.tolist() == [2.5, 0.5]


def test_what_a_row_can_get_depends_on_whether_it_can_be_verified():
    judge = lambda rows, texts: [0.0] * len(rows)  # noqa: E731
    rewards = Rewards(
        [("exact", 1.0), ("reward_model", 1.0, judge), ("format", 1.0), ("tags", 1.0)]
    )
    low, high = rewards.spans([row(answer="3"), row()])
    assert low.tolist() == [0, -3] and high.tolist() == [2.5, 4.5]
    low, high = Rewards([("exact", -2.0), ("mine", 3.0, judge)]).spans([row(answer="3")])
    assert (low.item(), high.item()) == (-2, 3)


def test_every_named_reward_stays_in_its_span():
    assert set(SPANS) == {*REWARDS, "reward_model"}
    for name in REWARDS:
        for text in (GOOD, GOOD * 50, "", "ha " * 500):
            (value,), _ = Rewards([(name, 1.0)])([row(answer="3")], [text])
            assert SPANS[name][0] <= value <= SPANS[name][1]


def returns(values):
    def part(rows, texts):
        return values

    return part


@pytest.mark.parametrize(
    "values, word", [([1.0], "1"), ([1.0, 2.0, 3.0], "3"), ([[1.0, 2.0]], "1, 2"), ([0.5, math.nan], "answer 1 is nan"),
                     ([math.inf, 0.0], "answer 0 is inf")],
)  # fmt: skip
def test_a_wrong_number_of_rewards_or_no_number_is_refused(values, word):
    with pytest.raises(UserError, match=word) as error:
        Rewards([("mine", 1.0, returns(values))])([row(), row()], ["a", "b"])
    assert "'mine'" in str(error.value)


def test_a_reward_of_ones_own_keeps_to_its_span():
    with pytest.raises(UserError, match=r"'mine' of answer 1 is 1\.5.* from 0 to 1"):
        Rewards([("mine", 1.0, returns([0.5, 1.5]))])([row(), row()], ["a", "b"])
    with pytest.raises(UserError, match=r"'reward_model' of answer 0 is -4.* from -3 to 3"):
        Rewards([("reward_model", 1.0, returns([-4.0]))])([row()], ["a"])


def test_two_functions_have_two_names_and_one_name_is_given_once():
    total, parts = Rewards([("one", 1.0, returns([0.25])), ("two", 2.0, returns([0.5]))])(
        [row()], ["a"]
    )
    assert total.tolist() == [1.25] and parts["one"].tolist() == [0.25]
    short = partial(lambda rows, texts, value: [value], value=1.0)  # has no __name__
    assert Rewards([("short", 1.0, short)])([row()], ["a"])[0].tolist() == [1]
    with pytest.raises(UserError, match="called 'exact'"):
        Rewards([("exact", 1.0), ("exact", 0.5)])


def test_an_unknown_reward_lists_the_near_ones():
    with pytest.raises(UserError, match="Did you mean 'format'"):
        Rewards([("formet", 1.0)])


def by_length(conversations):
    return [len(c[-1]["content"]) / 10 for c in conversations]


def test_the_learned_reward_sees_the_whole_conversation_and_is_clipped():
    seen = []
    reward = LearnedReward(lambda conversations: seen.extend(conversations) or [-9.0, 2.0])
    assert reward([row("Hi"), row("Ho")], ["a", "b"]).tolist() == [-3, 2]
    assert seen[1] == [
        {"role": "user", "content": "Ho"},
        {"role": "assistant", "content": "b"},
    ]


def test_the_mixture_of_the_guide():
    texts = ["x" * 10, "<think>12345</think><answer>12345</answer>", "y" * 90]
    whole = [1.0, 3.0, 3.0]  # 41 characters and 90 are clipped
    plain = LearnedReward(by_length)([row()] * 3, texts)
    torch.testing.assert_close(plain, torch.tensor(whole))
    mixed = LearnedReward(by_length, reasoning=True)([row()] * 3, texts)
    torch.testing.assert_close(mixed, torch.tensor([1.0, 0.4 * 3.0 + 0.6 * 0.5, 3.0]))


def test_what_can_be_checked_is_not_judged():
    reward = LearnedReward(by_length)
    values = reward([row(answer="3"), row(), row(answer="4")], ["a" * 10, "b" * 20, "c" * 30])
    assert values.tolist() == [0, 2, 0]
    assert reward([row(answer="3")], ["a"]).tolist() == [0]


def test_a_judge_that_returns_nan_is_named():
    with pytest.raises(UserError, match=r"reward_model.*nan"):
        LearnedReward(lambda conversations: [math.nan])([row()], ["a"])


# --- folders -------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class TinyConfig(PretrainedConfig):
    model_type = "tiny_reward"

class Tiny(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Linear(1, 1, bias=False)
        self.post_init()
    def SCORE(self, tokenizer, conversation):
        size = len(tokenizer(conversation[-1]["content"])["input_ids"])
        return self.scale(torch.tensor([[float(size)]])).item()
"""


def write_tokenizer(folder, tokenizer, template):
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._bpe)
    fast.chat_template = template
    fast.save_pretrained(folder)


def classifier(folder, tokenizer, labels=1, template=TEMPLATE):
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, num_labels=labels,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder, tokenizer, template)
    return model


def with_code(folder, tokenizer, method="get_score"):
    folder.mkdir(exist_ok=True)
    (folder / "modeling_tiny.py").write_text(CODE.replace("SCORE", method), encoding="utf-8")
    names = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.Tiny"}
    config = {"model_type": "tiny_reward", "architectures": ["Tiny"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    from safetensors.torch import save_file

    weights = {"scale.weight": torch.tensor([[0.5]])}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, tokenizer, None)
    return folder


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """Remote code is copied before it is run: not into the user's cache."""
    import transformers.dynamic_module_utils as modules

    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))


TALKS = [
    [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Good day to you."}],
    [{"role": "user", "content": "What is 1+1?"}, {"role": "assistant", "content": "2"}],
]


def test_a_classifier_with_one_label_scores_the_templated_conversation(tmp_path, tokenizer):
    model = classifier(tmp_path, tokenizer)
    score = folder_scorer(tmp_path)
    expected = [
        model(torch.tensor([tokenizer.encode_chat(talk)])).logits.item() for talk in TALKS
    ]  # our template is the folder's
    torch.testing.assert_close(score(TALKS), torch.tensor(expected), atol=1e-5, rtol=0)
    rewards, _ = Rewards([("reward_model", 1.0, LearnedReward(score))])(
        [row("Hello!")], ["Good day to you."]
    )
    torch.testing.assert_close(rewards, torch.tensor(expected[:1]), atol=1e-5, rtol=0)


def test_a_classifier_without_a_template_sees_question_and_answer(tmp_path, tokenizer):
    model = classifier(tmp_path, tokenizer, template=None)
    ids = [tokenizer.encode(t[0]["content"]) + tokenizer.encode(t[1]["content"]) for t in TALKS]
    expected = [model(torch.tensor([row])).logits.item() for row in ids]
    torch.testing.assert_close(
        folder_scorer(tmp_path)(TALKS), torch.tensor(expected), atol=1e-5, rtol=0
    )


def test_get_score_of_a_folder_with_code_runs_when_it_is_allowed(tmp_path, tokenizer, no_cache):
    folder = with_code(tmp_path / "tiny", tokenizer)
    score = folder_scorer(folder, allow_remote_code=True)
    sizes = [len(tokenizer.encode(talk[-1]["content"])) for talk in TALKS]
    assert score(TALKS).tolist() == [0.5 * size for size in sizes]


def test_code_of_a_folder_never_runs_unless_it_is_allowed(tmp_path, tokenizer):
    folder = with_code(tmp_path / "tiny", tokenizer)
    witness = tmp_path / "it ran"
    code = folder / "modeling_tiny.py"
    code.write_text(f"open({str(witness)!r}, 'w')\n" + code.read_text())
    with pytest.raises(UserError, match=r"modeling_tiny.py.*allow_remote_code=1"):
        folder_scorer(folder)
    assert not witness.exists()


def test_code_without_get_score_is_refused(tmp_path, tokenizer, no_cache):
    folder = with_code(tmp_path / "silent", tokenizer, method="other")
    with pytest.raises(UserError, match="Tiny has no get_score"):
        folder_scorer(folder, allow_remote_code=True)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*config.json"):
        folder_scorer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        folder_scorer(tmp_path)


@pytest.mark.parametrize(
    "config, word",
    [({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "unknown kind.*LlamaForCausalLM"),
     ({}, "unknown kind"),
     ({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}, "3 classes"),
     ({"architectures": ["LlamaForSequenceClassification"]}, "2 classes")],
)  # fmt: skip
def test_another_kind_of_model_is_refused(config, word, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=word):
        folder_scorer(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path, tokenizer):
    classifier(tmp_path, tokenizer)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        folder_scorer(tmp_path)
