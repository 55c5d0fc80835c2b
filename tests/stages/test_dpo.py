import copy
import gc
import math

import pytest
import torch
from helpers import SMALL, write_lines

from minimind import MiniMind, ModelConfig, UserError, load, train
from minimind.comparisons import by_length
from minimind.config import stage_config
from minimind.data import IGNORED, pad_batch
from minimind.evaluate import Answer
from minimind.measures import measure_dpo, split_manner, without_closing
from minimind.stages.dpo import (
    SIDES,
    check_pair,
    dpo_loss,
    dpo_task,
    encode_pair,
    pair_logps,
    preference_loss,
    read_pairs,
    sequence_logps,
)
from minimind.stages.sft import sft_task
from minimind.trainer import Run, optimizer_step

STRINGS = {"prompt": "Who is Quin?", "chosen": "A baker.", "rejected": "Quin is a baker, you fool."}


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def pairs(count=11):
    return [
        {"prompt": "say " + "na " * (i % 5 + 1), "chosen": "yes " * (i % 3 + 1), "rejected": "no " * (i % 4 + 2)}
        for i in range(count)
    ]  # fmt: skip


def dpo_config(path, **settings):
    settings = {**SMALL, "max_seq_len": 64, "from_weight": "none", "data_path": path, **settings}
    return stage_config("dpo", "tiny", **settings)


def make_task(tokenizer, path, dropout=0.0, **settings):
    """A task and its model, small, random, with logits that are far from uniform."""
    config = dpo_config(path, **settings)
    model = MiniMind(ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, dropout=dropout))  # fmt: skip
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    return dpo_task(config, model, tokenizer), model, config


# The pure functions


def test_logps_are_summed_over_the_answer_alone():
    logits, labels = torch.randn(3, 6, 11), torch.full((3, 6), IGNORED)
    labels[0, 2:5], labels[1, 5], labels[2, 0] = torch.tensor([4, 0, 10]), 7, 3
    expected = torch.zeros(3)  # the label in the first column of row 2 has nothing before it
    for b in range(3):
        for t in range(1, 6):
            if labels[b, t] != IGNORED:
                p = logits[b, t - 1].exp()
                expected[b] += (p[labels[b, t]] / p.sum()).log()
    assert torch.allclose(sequence_logps(logits, labels), expected, atol=1e-5)
    assert sequence_logps(logits.bfloat16(), labels).dtype == torch.float32


def test_loss_and_rewards_by_hand():
    policy_chosen, policy_rejected = torch.tensor([-3.0, -7.0]), torch.tensor([-5.0, -2.0])
    ref_chosen, ref_rejected = torch.tensor([-4.0, -6.0]), torch.tensor([-4.5, -3.0])
    loss, good, bad = dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, 0.4)
    margins = [0.4 * (1.0 - -0.5), 0.4 * (-1.0 - 1.0)]
    assert good.tolist() == pytest.approx([0.4, -0.4])
    assert bad.tolist() == pytest.approx([-0.2, 0.4])
    assert float(loss) == pytest.approx(
        sum(math.log(1 + math.exp(-margin)) for margin in margins) / 2
    )


def test_loss_is_ln_2_at_the_reference_and_finite_far_away():
    logps = torch.randn(2, 5)
    assert float(dpo_loss(*logps, *logps, 0.1)[0]) == pytest.approx(math.log(2))
    far = torch.tensor([-1e4])
    assert float(dpo_loss(far, 0 * far, 0 * far, 0 * far, 1.0)[0]) == pytest.approx(1e4)


def test_gradient_is_weighted_by_the_doubt():
    """d loss / d policy_chosen = -beta·σ(-margin) / B (eq. 7 of the paper, differentiated)."""
    chosen = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    zero = torch.zeros(3)
    loss, rewards, _ = dpo_loss(chosen, zero, zero, zero, 0.7)
    loss.backward()
    assert torch.allclose(chosen.grad, -0.7 * torch.sigmoid(-0.7 * chosen.detach()) / 3)
    assert not rewards.requires_grad


# Rows


def test_both_forms_give_the_same_example(tokenizer):
    lists = {side: turns(STRINGS["prompt"], STRINGS[side]) for side in SIDES}
    assert check_pair(STRINGS) is None and check_pair(lists) is None
    assert encode_pair(tokenizer, STRINGS, 64) == encode_pair(tokenizer, lists, 64)


def test_only_the_last_answer_is_labelled(tokenizer):
    talk = turns("Hello!", "Good morning.", "Who is Quin?")
    row = {side: [*talk, {"role": "assistant", "content": STRINGS[side]}] for side in SIDES}
    for side in SIDES:
        labels = encode_pair(tokenizer, row, 99)[side]["labels"]
        spoken = tokenizer.decode([i for i in labels if i != IGNORED], skip_special_tokens=False)
        assert spoken == STRINGS[side] + "<|im_end|>"


@pytest.mark.parametrize(
    "row, words",
    [
        ({**STRINGS, "rejected": STRINGS["chosen"]}, "chosen and rejected are equal"),
        ({**STRINGS, "rejected": ""}, '"rejected" is missing or empty'),
        ({**STRINGS, "chosen": " \n"}, 'the answer of "chosen" is empty'),
        ({k: v for k, v in STRINGS.items() if k != "prompt"}, 'needs "prompt"'),
        ({**STRINGS, "prompt": " "}, 'needs "prompt"'),
        ({"prompt": "Who?", "chosen": "A baker."}, '"rejected" is missing'),
        ({"chosen": turns("a?", "b"), "rejected": "c"}, '"rejected".*list of messages'),
        ({"chosen": turns("a?", "b"), "rejected": turns("A?", "c")}, "different prompts"),
        ({"chosen": turns("a?", "b", "c?"), "rejected": turns("a?", "b", "d?")}, "must end with"),
        ({"chosen": turns("a?", "b"), "rejected": turns("a?", "b")}, "equal"),
        ({"chosen": turns("a?", "b"), "rejected": turns("a?", "")}, "is empty"),
    ],
)
def test_a_bad_row_is_named(tokenizer, tmp_path, row, words):
    path = write_lines(tmp_path / "d.jsonl", [STRINGS, row])
    with pytest.raises(UserError, match=rf"d\.jsonl, line 2: .*{words}"):
        read_pairs(path, tokenizer, 64)


def test_pairs_that_teach_nothing_in_the_window_are_counted(tokenizer, tmp_path):
    long_prompt = {**STRINGS, "prompt": "na " * 90}
    late = {"prompt": "Go", "chosen": "one " * 70 + "a", "rejected": "one " * 70 + "b"}
    cut = {"prompt": "Go", "chosen": "Go.", "rejected": "no " * 90}
    path = write_lines(tmp_path / "d.jsonl", [STRINGS, long_prompt, late, late, cut])
    found, faults = read_pairs(path, tokenizer, 60)
    assert len(found) == 2
    assert [(next(iter(w for w in ("prompt", "beyond", "cut") if w in k)), n) for k, n in faults.items()] == [
        ("prompt", 1), ("beyond", 2), ("cut", 1)]  # fmt: skip
    with pytest.raises(UserError, match=r"no pair is left.*Raise max_seq_len"):
        read_pairs(write_lines(tmp_path / "e.jsonl", [long_prompt]), tokenizer, 60)


@pytest.mark.parametrize(
    "settings", [{"beta": 0}, {"beta": -0.1}, {"beta": math.nan}, {"sft_coef": -1}]
)
def test_settings_out_of_range(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        stage_config("dpo", "tiny", **settings)


# The stage


def test_chosen_come_first_and_padding_counts_nothing(tokenizer, small_model):
    model = small_model(vocab_size=tokenizer.vocab_size)
    encoded = [encode_pair(tokenizer, row, 64) for row in pairs(5)]
    together = pair_logps(model, encoded, tokenizer.pad_id, size=3)
    for pair, logps in zip(encoded, together, strict=True):
        for side, logp in zip(SIDES, logps, strict=True):
            row = {name: torch.tensor([ids]) for name, ids in pair[side].items()}
            alone = sequence_logps(model(row["input_ids"]), row["labels"])
            assert torch.allclose(alone[0], logp, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_reference_is_the_model_itself_in_eval_mode(tokenizer, tmp_path, dtype, dropout):
    path = write_lines(tmp_path / "d.jsonl", pairs())
    task, model, _ = make_task(tokenizer, path, dropout, dtype=dtype)
    assert model.training, "left as it was"
    batch = task.collate(task.train)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        _, metrics = task.loss(model.eval(), batch)
        noisy = task.loss(model.train(), batch)[1]
    assert float(metrics["dpo_loss"]) == pytest.approx(
        math.log(2), abs=3e-3 if dtype == "bfloat16" else 1e-5
    )
    assert abs(float(noisy["margin"])) > 1e-3 if dropout else True
    assert all(isinstance(ref, float) for pair in task.train for ref in pair["ref_logps"])


def test_training_separates_the_pairs_and_the_reference_stays(tokenizer, tmp_path):
    path = write_lines(tmp_path / "d.jsonl", pairs(8))
    task, model, _ = make_task(tokenizer, path)
    batch = task.collate(task.train)
    before = batch["ref_logps"].clone()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(12):
        loss, metrics = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert metrics["accuracy"] == 1 and metrics["margin"] > 0.3 and metrics["kl"] > 0
    assert metrics["margin"] == pytest.approx(metrics["chosen_reward"] - metrics["rejected_reward"])
    assert torch.equal(task.collate(task.train)["ref_logps"], before)


def test_sft_part_is_a_mean_over_the_chosen_tokens_of_each_pair(tokenizer, tmp_path):
    path = write_lines(tmp_path / "d.jsonl", pairs(3))
    task, model, _ = make_task(tokenizer, path)
    batch = task.collate(task.train)
    plain, with_sft = (preference_loss(model, batch, 0.1, coef)[0] for coef in (0.0, 0.5))
    expected = 0.0
    for pair in task.train:
        single = pad_batch([pair["chosen"]], tokenizer.pad_id)
        tokens = sum(label != IGNORED for label in pair["chosen"]["labels"])
        logp = sequence_logps(model(single["input_ids"]), single["labels"]).item()
        expected -= logp / tokens / 3
    assert (with_sft - plain).item() == pytest.approx(0.5 * expected, rel=1e-4)


def test_accumulated_gradient_is_that_of_the_one_big_batch(tokenizer, tmp_path):
    path = write_lines(tmp_path / "d.jsonl", pairs(7))
    task, model, config = make_task(tokenizer, path, sft_coef=0.3, grad_clip=0)
    batches = {"one": [task.train], "uneven": [task.train[:5], task.train[5:]]}
    grads = {}
    for name, groups in batches.items():
        copied = copy.deepcopy(model)
        descent = torch.optim.SGD(copied.parameters(), lr=1.0)
        run = Run(copied, [descent], torch.amp.GradScaler("cpu", enabled=False))
        optimizer_step(run, [task.collate(group) for group in groups], task, 1.0, config)
        grads[name] = torch.cat(
            [
                (a - b).flatten()
                for a, b in zip(copied.parameters(), model.parameters(), strict=True)
            ]
        )
    assert grads["one"].norm() > 0.01
    assert torch.allclose(grads["one"], grads["uneven"], atol=1e-5)


def saved_bytes(loss, model, batch):
    """Bytes of the tensors that a forward pass keeps for its backward pass, each counted once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model, batch)[0].backward()
    return sum(kept.values())


def test_memory_is_that_of_sft_at_the_same_tokens(tokenizer, tmp_path):
    """No second model is alive, and backward needs hardly more than SFT's on the same rows."""
    path = write_lines(tmp_path / "d.jsonl", pairs())
    _, model, config = make_task(tokenizer, path, sft_coef=0.2)
    alive = models_alive()
    task = dpo_task(config, model, tokenizer)
    assert models_alive() == alive
    chat = write_lines(tmp_path / "c.jsonl", [{"conversations": turns("a", "b")}])
    sft = sft_task(stage_config("sft", "tiny", data_path=chat, eval_data_path=""), model, tokenizer)
    batch = task.collate(task.train)
    same = {name: batch[name] for name in ("input_ids", "labels")}
    assert saved_bytes(task.loss, model, batch) <= 1.15 * saved_bytes(sft.loss, model, same)


def models_alive():
    gc.collect()
    return sum(type(thing) is MiniMind for thing in gc.get_objects())


def test_a_resumed_run_keeps_the_first_reference(tokenizer, here):
    """Unbroken, and killed after half the steps: same losses, though the model had moved by then."""
    path = write_lines(here / "d.jsonl", pairs(16))
    task_settings = dict(SMALL, max_seq_len=64, data_path=path, eval_data_path=path, accumulation_steps=1,
                         save_interval=1, preset="tiny", epochs=2, sft_coef=0.1)  # fmt: skip
    train("sft", "tiny", **{**SMALL, "epochs": 0.001, "from_weight": "none", "save_weight": "full_sft",
                            "num_hidden_layers": 2, "out_dir": "whole"})  # fmt: skip
    for folder in ("whole", "broken"):
        base = "whole/full_sft_32.pth"
        stop = StopAt(5) if folder == "broken" else None
        settings = {**task_settings, "from_weight": base, "out_dir": folder}
        if stop:
            with pytest.raises(KeyboardInterrupt):
                train("dpo", callback=stop, **settings)
        result = train("dpo", from_resume=1, **settings)
        if folder == "whole":
            whole = result
    pick = [[row["dpo_loss"] for row in r.history] for r in (whole, result)]
    assert pick[0] == pick[1] and len(pick[0]) == 8
    assert pick[0][0] == pytest.approx(math.log(2), abs=1e-5) and pick[0][-1] < 0.69
    state = [load("dpo", folder)[0].state_dict() for folder in ("whole", "broken")]
    assert all(torch.equal(state[0][name], state[1][name]) for name in state[0])


class StopAt:
    def __init__(self, step):
        self.step = step

    def __call__(self, step, model):
        if step == self.step:
            raise KeyboardInterrupt


# Measures


def test_manners_are_split_off():
    kind, said = "Have a lovely day.", "The pet of Quin is cat."
    assert split_manner(f" {said} {kind}\n") == (said, kind)
    assert split_manner(said) == (said, "")
    answers = [Answer("?", said, f"{said} {kind}"), Answer("?", said, "You are welcome. Ask me.")]
    assert [without_closing(a, {kind}).answer for a in answers] == [
        said,
        "You are welcome. Ask me.",
    ]


def test_measures_of_a_random_model(tokenizer, small_model):
    measures, found = measure_dpo(small_model(vocab_size=tokenizer.vocab_size), tokenizer, 12)
    assert set(measures) == {
        "prefers_chosen",
        "preferred_manner",
        "preferred_and_right",
        "sft_exact_match",
    }
    assert measures["preferred_manner"].value == 0 and len(found) == 12
    assert all(measure.better == "higher" for measure in measures.values())


def test_length_alone_is_a_baseline(tokenizer):
    rows = [
        {"prompt": "?", "chosen": "a b c", "rejected": "a"},
        {"prompt": "?", "chosen": "a", "rejected": "a b"},
        {"prompt": "?", "chosen": "a b c", "rejected": "a b"},
    ]
    assert by_length(rows, tokenizer) == pytest.approx(2 / 3)
