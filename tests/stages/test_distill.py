import json
import math

import pytest
import torch
from helpers import SMALL, chats, texts, write_lines

import minimind
from minimind import MiniMind, ModelConfig, Tokenizer, UserError
from minimind.checkpoint import load_sidecar, read_tensors, save_weight
from minimind.config import data_samples, stage_config
from minimind.stages.distill import (
    distill_task,
    distillation_loss,
    load_teacher,
    missing_teacher,
    start_from_teacher,
)
from minimind.stages.sft import sft_task

STUDENT = {name: value for name, value in SMALL.items() if "hidden" not in name}


def inputs(B=2, T=5, V=7):
    student, teacher = 2 * torch.randn(B, T, V), 2 * torch.randn(B, T, V)
    labels = torch.randint(0, V, (B, T))
    labels[0, :3] = labels[1, 4] = -100  # 2 + 3 labels are left after the shift
    return student.requires_grad_(), teacher.requires_grad_(), labels


def by_hand(student, teacher, labels, alpha, T):
    """The formula, token by token, in Python's own floats."""
    student, teacher = student.tolist(), teacher.tolist()
    ce = kl = count = 0
    for b, row in enumerate(labels.tolist()):
        for t, label in enumerate(row[1:]):
            if label == -100:
                continue
            count += 1
            z, v = student[b][t], teacher[b][t]
            ce += math.log(sum(math.exp(a) for a in z)) - z[label]
            q, p = ([math.exp(a / T) for a in logits] for logits in (z, v))
            q, p = [a / sum(q) for a in q], [a / sum(p) for a in p]
            kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return alpha * ce / count + (1 - alpha) * T * T * kl / count, ce / count, kl / count


@pytest.mark.parametrize("alpha, temperature", [(0.5, 1.5), (0.0, 4.0), (1.0, 2.0), (0.3, 0.7)])
def test_the_loss_is_the_formula(alpha, temperature):
    student, teacher, labels = inputs()
    loss, parts = distillation_loss(student, teacher, labels, alpha, temperature)
    expected, ce, kl = by_hand(student, teacher, labels, alpha, temperature)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert float(parts["cross_entropy"]) == pytest.approx(ce, abs=1e-5)
    assert float(parts["kl"]) == pytest.approx(kl, abs=1e-5)
    assert not any(part.requires_grad for part in parts.values())


def test_only_labelled_positions_and_only_the_student_learn():
    student, teacher, labels = inputs()
    distillation_loss(student, teacher, labels, 0.5, 2.0)[0].backward()
    assert teacher.grad is None
    assert (student.grad.abs().sum(-1) > 0).tolist() == [
        [False, False, True, True, False],
        [True, True, True, False, False],
    ]


def test_the_gradient_keeps_its_size_at_high_temperature():
    student, teacher, labels = inputs()
    sizes = []
    for temperature in (20.0, 80.0):
        loss, _ = distillation_loss(student, teacher, labels, 0.0, temperature)
        sizes.append(float(torch.autograd.grad(loss, student)[0].norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)  # without T² it would be a sixteenth


def test_no_label_at_all_gives_zero_with_a_gradient():
    student, teacher, labels = inputs()
    loss, _ = distillation_loss(student, teacher, torch.full_like(labels, -100), 0.5, 2.0)
    loss.backward()
    assert loss.item() == 0 and float(student.grad.abs().sum()) == 0


def test_logits_of_another_vocabulary_are_refused():
    student, teacher, labels = inputs()
    with pytest.raises(UserError, match=r"\(2, 5, 7\).*\(2, 5, 6\)"):
        distillation_loss(student, teacher[..., :6], labels, 0.5, 2.0)


@pytest.mark.parametrize(
    "setting, words",
    [({"alpha": -0.1}, "alpha=-0.1 must be from 0"), ({"alpha": 1.5}, "alpha=1.5"),
     ({"temperature": 0}, "temperature=0 must be above 0"), ({"temperature": math.nan}, "temperature=nan"),
     ({"teacher_preset": "cuorse"}, "Did you mean 'course'"), ({"hidden_size": 64}, "'student_hidden_size'"),
     ({"student_from_teacher": 1, "from_weight": "pretrain"}, "Give one of the two")],
)  # fmt: skip
def test_settings_out_of_range(setting, words):
    with pytest.raises(UserError, match=words):
        stage_config("distill", **setting)


def test_the_defaults_are_the_guides():
    config = stage_config("distill")
    assert (config.epochs, config.batch_size, config.learning_rate) == (6, 32, 5e-6)
    assert (config.alpha, config.temperature, config.save_weight) == (0.5, 1.5, "full_dist")
    assert (config.teacher_hidden_size, config.teacher_num_layers) == (768, 16)
    assert (config.hidden_size, config.num_hidden_layers) == (512, 8)


@pytest.fixture
def settings(tmp_path, tokenizer):
    """A teacher of 4 layers, untrained, and settings that distil it into a student of 3."""
    teacher = MiniMind(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=48, num_hidden_layers=4,
                                   num_attention_heads=4, rope_theta=1e6))  # fmt: skip
    save_weight(tmp_path / "full_sft_48.pth", teacher, tokenizer, [], {})
    return {**STUDENT, "data_path": write_lines(tmp_path / "chats.jsonl", chats()), "out_dir": str(tmp_path),
            "tokenizer_path": str(data_samples("tokenizer.json")), "teacher_hidden_size": 48,
            "teacher_num_layers": 4, "student_hidden_size": 48, "student_num_layers": 3}  # fmt: skip


def test_a_student_comes_to_say_what_its_teacher_says(settings, tmp_path):
    before = read_tensors(tmp_path / "full_sft_48.pth")
    settings = {**settings, "alpha": 0.0, "temperature": 2.0, "accumulation_steps": 1}
    result = minimind.train("distill", **{**settings, "epochs": 8, "learning_rate": 3e-3})
    assert result.history[-1]["kl"] < 0.5 * result.history[0]["kl"]
    assert result.weight_path == tmp_path / "full_dist_48.pth"
    assert result.model.config.num_hidden_layers == 3
    after = read_tensors(tmp_path / "full_sft_48.pth")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_teacher_rests(settings, tokenizer):
    teacher = load_teacher(stage_config("distill", **settings), tokenizer, torch.device("cpu"))
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_heldout_rows_are_measured_by_cross_entropy_whatever_alpha(settings, tokenizer):
    config = stage_config("distill", **settings, alpha=0.1)
    task = distill_task(config, student := student_of(config, tokenizer), tokenizer)
    plain = sft_task(config, student, tokenizer)
    batch = task.collate(task.train[:5])
    expected = plain.loss(student, batch)[0].item()
    assert task.loss(student.eval(), batch)[0].item() == pytest.approx(expected)
    assert abs(task.loss(student.train(), batch)[0].item() - expected) > 0.1


def student_of(config, tokenizer):
    shape = dict(hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers)
    return MiniMind(ModelConfig(vocab_size=tokenizer.vocab_size, num_attention_heads=4, **shape))


def test_a_student_may_start_from_evenly_spaced_layers(settings, tokenizer):
    config = stage_config("distill", **settings, student_from_teacher=1, alpha=1.0)
    teacher = load_teacher(config, tokenizer, torch.device("cpu"))
    student = student_of(config, tokenizer)
    distill_task(config, student, tokenizer)
    for mine, taken in enumerate((0, 2, 3)):
        weight = student.model.layers[mine].mlp.up_proj.weight
        assert torch.equal(weight, teacher.model.layers[taken].mlp.up_proj.weight)
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    assert student.lm_head.weight is student.model.embed_tokens.weight  # a copy, still tied
    assert student.lm_head.weight.requires_grad
    with pytest.raises(UserError, match="cannot start from a teacher of 3"):
        start_from_teacher(teacher, student)
    narrow = MiniMind(
        ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2)
    )
    with pytest.raises(UserError, match="does not fit"):
        start_from_teacher(narrow, teacher)


def test_the_vocabulary_is_compared_before_anything_runs(settings, tmp_path):
    other = Tokenizer.train([row["text"] for row in texts()], 300)
    other.save(tmp_path / "other.json")
    settings |= {"tokenizer_path": str(tmp_path / "other.json"), "data_path": "nowhere.jsonl"}
    with pytest.raises(UserError, match=f"another vocabulary.*against {other.vocab_size}"):
        minimind.train("distill", **settings)


def test_as_many_tokens_are_not_yet_the_same_tokens(settings, tmp_path, tokenizer):
    content = json.loads(tokenizer.to_json())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "other.json").write_text(json.dumps(content), encoding="utf-8")
    settings |= {"tokenizer_path": str(tmp_path / "other.json")}
    assert Tokenizer.load(tmp_path / "other.json").vocab_size == tokenizer.vocab_size
    with pytest.raises(UserError, match="4 entries differ"):
        minimind.train("distill", **settings)


@pytest.mark.parametrize(
    "wrong, words",
    [({"teacher_weight": "nowhere.pth"}, "There is no teacher nowhere.pth"),
     ({"teacher_weight": "dpo"}, "minimind dpo"),
     ({"teacher_num_layers": 5}, "48 wide with 4 layers; the settings say teacher_hidden_size=48, teacher_num_layers=5"),
     ({"save_weight": "full_sft"}, "would overwrite its teacher")],
)  # fmt: skip
def test_a_teacher_that_cannot_be(wrong, words, settings, tmp_path):
    with pytest.raises(UserError, match=words):
        minimind.train("distill", **{**settings, **wrong})
    assert not list(tmp_path.glob("full_dist*"))


def test_a_missing_teacher_names_the_stages_that_make_it(settings, tmp_path):
    def runs(**more):
        found = missing_teacher(stage_config("distill", **{**settings, **more}))
        assert all((c.hidden_size, c.num_hidden_layers) == (64, 4) for _, c in found)
        assert all(c.out_dir == str(tmp_path) and c.num_attention_heads == 4 for _, c in found)
        return [stage for stage, _ in found]

    absent = {"teacher_hidden_size": 64}
    assert missing_teacher(stage_config("distill", **settings)) == []
    assert runs(**absent) == ["pretrain", "sft"]
    assert runs(**absent, teacher_weight="pretrain") == ["pretrain"]
    assert runs(**absent, alpha=1.0) == []
    assert runs(**absent, alpha=1.0, student_from_teacher=1) == ["pretrain", "sft"]
    (tmp_path / "pretrain_64.pth").touch()
    assert runs(**absent) == ["sft"]


def test_a_missing_teacher_is_trained(settings, tmp_path, monkeypatch):
    for stage, rows in (("pretrain", texts()), ("sft", chats())):
        path = write_lines(tmp_path / f"{stage}.jsonl", rows)
        small = {**SMALL, "data_path": path, "eval_data_path": ""}
        monkeypatch.setitem(minimind.config.PRESETS["tiny"], stage, small)
    settings |= {"teacher_hidden_size": 40, "teacher_preset": "tiny", "epochs": 1}
    minimind.train("distill", **settings)
    lineage = load_sidecar(tmp_path / "full_sft_40.pth")["stages"]
    assert [run["stage"] for run in lineage] == ["pretrain", "sft"]
    assert lineage[0]["settings"]["num_hidden_layers"] == 4
    assert (tmp_path / "full_dist_48.pth").is_file()
