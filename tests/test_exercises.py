"""The checks are checked: stubs fail, solutions pass, every kept mistake gets its own sentence."""

import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

FOLDER = Path(__file__).resolve().parent.parent / "exercises"
sys.path.insert(0, str(FOLDER))

import build  # noqa: E402
import checks  # noqa: E402

from minimind import MiniMind, ModelConfig  # noqa: E402
from minimind.data import pack, useful_share  # noqa: E402
from minimind.evaluate import pass_at_k  # noqa: E402
from minimind.lora import adapters, add_lora, lora_state, merge_lora  # noqa: E402
from minimind.model import MoE, RMSNorm, apply_rotary, positions_and_mask, rotary_embedding  # noqa: E402
from minimind.stages import reason  # noqa: E402
from minimind.stages.common import k3  # noqa: E402
from minimind.stages.dpo import dpo_loss, sequence_logps  # noqa: E402
from minimind.stages.grpo import group_advantages  # noqa: E402
from minimind.stages.pretrain import next_token_loss  # noqa: E402
from minimind.stages.sft import chat_labels  # noqa: E402
from minimind.trainer import learning_rate  # noqa: E402

TOPICS = checks.topics()
EXERCISES = [exercise for topic in TOPICS.values() for exercise in topic.EXERCISES]
MISTAKES = [(exercise, mistake) for exercise in EXERCISES for mistake in exercise.mistakes]
SEEDS = (checks.SEED, 2, 3)

each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
each_topic = pytest.mark.parametrize("stem", TOPICS)


@pytest.fixture(autouse=True)
def progress_file(tmp_path, monkeypatch):
    """Keep the learner's own progress out of the tests."""
    monkeypatch.setattr(checks, "PROGRESS_FILE", tmp_path / "progress.json")
    return tmp_path / "progress.json"


def made_stub(exercise):
    """The function that a learner finds in the notebook."""
    names = dict(vars(sys.modules[exercise.solution.__module__]))
    exec(build.stub(exercise), names)
    return names[exercise.name]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny; threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Every exercise


@each_exercise
def test_stub_fails_as_not_written(exercise):
    assert checks.examine(exercise, made_stub(exercise)) == checks.NOT_WRITTEN
    assert "NotImplementedError" not in build.solution(exercise)


@each_exercise
def test_solution_passes(exercise):
    assert [checks.examine(exercise, exercise.solution, seed) for seed in SEEDS] == [None] * 3


@pytest.mark.parametrize(
    "exercise, mistake", MISTAKES, ids=lambda x: getattr(x, "name", None) or x.__name__
)
def test_mistake_is_named(exercise, mistake):
    said = [checks.examine(exercise, mistake, seed) for seed in SEEDS]
    assert said == [checks.sentence(mistake)] * 3


@pytest.mark.parametrize(
    "exercise, mistake",
    [pair for pair in MISTAKES if pair[0].judge],
    ids=lambda x: getattr(x, "name", None) or x.__name__,
)
def test_judge_objects_to_the_mistake_itself(exercise, mistake):
    """Not only because its numbers are known: somebody's own version of it must fail too."""
    cases = exercise.cases(checks.SEED)
    results = [checks.outcome(exercise, mistake, case) for case in cases]
    assert exercise.judge(cases, results)


def spoiled(value, draw, everywhere):
    """A value of the same form with one number changed, or all of them."""
    if isinstance(value, torch.Tensor):
        wrong = value.detach().clone()
        place = ... if everywhere else tuple(draw.randrange(n) for n in wrong.shape)
        wrong[place] = ~wrong[place] if wrong.dtype == torch.bool else wrong[place] * 1.5 + 3
        return wrong + 0 * value if value.requires_grad else wrong
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + draw.randint(1, 5)
    if isinstance(value, bytes | str):
        return value + value[:1]
    if not value:
        return value
    keys = list(value) if isinstance(value, dict) else range(len(value))
    chosen = keys if everywhere else [draw.choice(keys)]
    new = {k: spoiled(value[k], draw, everywhere) if k in chosen else value[k] for k in keys}
    return new if isinstance(value, dict) else type(value)(new.values())


@pytest.mark.parametrize("seed", SEEDS)
@each_exercise
def test_random_wrong_value_fails(exercise, seed):
    draw = random.Random(seed)
    everywhere = exercise.judge is not None  # a judge may not care for every single number

    def wrong(*arguments):
        return spoiled(exercise.solution(*arguments), draw, everywhere)

    fault = checks.examine(exercise, wrong, seed)
    assert fault and fault != checks.NOT_WRITTEN
    if not exercise.judge:
        assert fault not in map(checks.sentence, exercise.mistakes)
        assert "expected" in fault and "yours" in fault


@each_exercise
def test_returning_nothing_is_explained(exercise):
    fault = checks.examine(exercise, lambda *a: None)
    assert "None" in fault and fault not in map(checks.sentence, exercise.mistakes)


@each_exercise
def test_text_is_complete(exercise):
    assert 1 <= exercise.difficulty <= 5 and 1 <= exercise.importance <= 5
    assert exercise.solution.__doc__ and len(exercise.hints) >= 2 and exercise.mistakes
    assert exercise.statement.strip() and exercise.minutes >= 5
    for mistake in exercise.mistakes:
        words = checks.sentence(mistake)
        assert 30 < len(words) < 200 and words[-1] in ".?!", mistake.__name__


def test_names_and_sentences_are_unique():
    names = [exercise.name for exercise in EXERCISES]
    sentences = [checks.sentence(mistake) for _, mistake in MISTAKES]
    assert len(set(names)) == len(names) and len(set(sentences)) == len(sentences)


@each_topic
def test_three_to_five_exercises_and_the_last_is_open(stem):
    exercises = TOPICS[stem].EXERCISES
    assert 3 <= len(exercises) <= 5
    assert exercises[-1].judge and "open-ended" in exercises[-1].title


# Other right answers pass


def attention_by_library(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def rotate_by_swapping_halves(x, positions, theta):
    angles = positions[:, None] / theta ** (torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def norm_weighted_in_float32(x, weight, eps):
    return (x.float() / (x.float().square().mean(-1, keepdim=True) + eps).sqrt() * weight).to(
        x.dtype
    )


def loss_by_log_softmax(logits, labels):
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    kept = (labels[:, 1:] != -100).float()
    return -(chosen * kept).sum() / max(kept.sum(), 1)


def merges_in_one_pass(word, merges):
    tokens = [bytes([b]) for b in word.encode()]
    for pair in merges:
        tokens = TOPICS["01_tokenizer"].merge_bytes(tokens, pair)
    return tokens


def mixture_by_softmax_of_chosen(x, router, experts, k):
    top = (x @ router.T).topk(k)
    scores = torch.full((len(x), len(router)), -torch.inf).scatter(-1, top.indices, top.values)
    return TOPICS["03_transformer"].mix(x, experts, scores.softmax(-1))


@pytest.mark.parametrize(
    "name, function",
    [
        ("causal_attention", attention_by_library),
        ("rotate", rotate_by_swapping_halves),
        ("rms_norm", norm_weighted_in_float32),
        ("next_token_loss", loss_by_log_softmax),
        ("encode_word", merges_in_one_pass),
        ("mixture", mixture_by_softmax_of_chosen),
        ("next_token_loss", next_token_loss),
        ("schedule", learning_rate),
        ("chat_labels", chat_labels),
        ("group_advantages", group_advantages),
        ("k3", k3),
        ("pass_at_k", pass_at_k),
        ("sequence_logps", sequence_logps),
        ("dpo_loss", lambda *arguments: dpo_loss(*arguments)[0]),
        ("weighted_token_loss", reason.weighted_token_loss),
        ("tag_weights", lambda ids, *rest: reason.tag_weights(*rest)),
    ],
)
def test_another_right_answer_passes(name, function):
    assert checks.examine(checks.find(name), function) is None


# The solutions are what the package does


def test_rms_norm_and_rotation_are_the_packages():
    x = torch.randn(2, 3, 5, 8)
    rms_norm, rotate = (checks.find(name).solution for name in ("rms_norm", "rotate"))
    assert torch.allclose(rms_norm(x[0], torch.ones(8), 1e-5), RMSNorm(8, 1e-5)(x[0]))
    positions, speeds = torch.arange(2, 7), 1e4 ** -(torch.arange(0, 8, 2) / 8)
    right = apply_rotary(x, *rotary_embedding(positions[None], speeds))
    assert torch.allclose(rotate(x, positions, 1e4), right, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_parameters_are_those_of_a_built_model(tied, qk_norm):
    config = ModelConfig(vocab_size=100, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied,
                         qk_norm=qk_norm)  # fmt: skip
    count = checks.find("count_parameters").solution
    assert count(config.to_dict()) == MiniMind(config).num_parameters
    assert count(ModelConfig().to_dict()) == 25_829_888


def test_mixture_is_the_packages():
    config = ModelConfig(vocab_size=10, hidden_size=8, num_attention_heads=2, num_key_value_heads=1,
                         use_moe=True, num_experts=4, num_experts_per_tok=2)  # fmt: skip
    moe, x = MoE(config), torch.randn(6, 8)
    experts = [(e.gate_proj.weight, e.up_proj.weight, e.down_proj.weight) for e in moe.experts]
    mine = checks.find("mixture").solution(x, moe.gate.weight, experts, 2)
    assert torch.allclose(mine, moe(x), atol=1e-6)


def test_lora_exercises_are_the_packages():
    model = add_lora(MiniMind(ModelConfig(vocab_size=20, hidden_size=16, num_attention_heads=2,
                                          num_key_value_heads=1, num_hidden_layers=2)), 3, 5.0, ["v_proj"])  # fmt: skip
    state, adapter = model.state_dict(), lora_state(model)
    for name in adapter:
        adapter[name].normal_()
    _, first = next(adapters(model))
    x = torch.randn(2, 4, 16)
    forward, merge = (checks.find(n).solution for n in ("lora_forward", "merge_adapter"))
    mine = forward(x, first.weight, first.lora_A.weight, first.lora_B.weight, 5.0)
    assert torch.allclose(mine, first(x), atol=1e-5)
    merged = merge({n: t for n, t in state.items() if n not in adapter}, adapter, 5 / 3)
    right = merge_lora(model).state_dict()
    assert merged.keys() == right.keys()
    assert all(torch.allclose(merged[name], right[name], atol=1e-5) for name in right)


def test_mask_and_positions_are_the_packages():
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    mask, positions = checks.find("mask_and_positions").solution(real)
    right_positions, right_mask = positions_and_mask(real.long(), real, 0)
    assert torch.equal(mask, right_mask[:, 0]) and torch.equal(positions, right_positions)


def test_data_exercises_are_the_packages(tokenizer):
    texts = ["The pet of Molla is a cat.", "37+9=46.", "Quin is a baker in Ironbridge."]
    blocks = pack(texts, tokenizer, 7)
    documents = [tokenizer.encode(text) for text in texts]
    mine = checks.find("pack").solution(documents, 7, tokenizer.pad_id)
    assert mine == [blocks[i]["input_ids"] for i in range(len(blocks))]
    share = checks.find("padding_share").solution([3, 9, 4], [[0, 1], [2]])
    assert math.isclose(share, 1 - useful_share([3, 9, 4], [[0, 1], [2]]))
    chat = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Yes."}]
    mine = checks.find("chat_ids").solution(tokenizer.encode, chat, tokenizer.bos_id,
                                            tokenizer.eos_id, True)  # fmt: skip
    assert mine == tokenizer.encode_chat(chat, add_generation_prompt=True)


# What the check says about everything else


def square(x):
    return x * x


@pytest.fixture
def toy():
    return checks.Exercise(
        solution=square, cases=lambda seed: [(torch.ones(2, 3) * 3,), (torch.arange(4.0),)],
        title="", difficulty=1, importance=1, minutes=1, statement="", hints=[], mistakes=[],
    )  # fmt: skip


def writes_into_its_input(x):
    x *= x
    return x


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda x: (x * x).tolist(), "expected a tensor, yours is a list"),
        (lambda x: (x * x)[None], r"expected the shape \(2, 3\), yours is \(1, 2, 3\)"),
        (lambda x: (x * x).double(), "dtype torch.float32, yours is torch.float64"),
        (lambda x: x * x + (x == 3), r"6 of 6 values differ, first at \[0, 0\].*9(.|\n)*10"),
        (lambda x: None, "yours is None. Did you forget to return"),
        (writes_into_its_input, "changes its input"),
        (lambda x: x @ x, r"raises RuntimeError.*Look at the line `\(lambda x: x @ x"),
        (lambda x: x * x * float("nan"), "nan"),
    ],
)
def test_faults_are_explained(toy, function, words):
    assert re.search(words, checks.examine(toy, function), re.DOTALL)


def test_random_numbers_of_the_learner_are_left_alone(toy):
    random.seed(5), torch.manual_seed(5)
    expected = random.random(), torch.rand(1)
    random.seed(5), torch.manual_seed(5)
    checks.examine(toy, square)
    assert (random.random(), torch.rand(1)) == expected


def test_progress_and_hints(capsys, progress_file):
    checks.progress()
    assert "Next: merge_step, in 01_tokenizer.ipynb" in capsys.readouterr().out
    exercise = EXERCISES[0]
    checks.check("merge_step", made_stub(exercise))
    assert "Not written yet" in capsys.readouterr().out and not progress_file.exists()
    checks.check("merge_step", exercise.solution)
    assert json.loads(progress_file.read_text()) == ["merge_step"]
    checks.progress()
    assert re.search(r"■□+ +1 of 5(.|\n)*Next: encode_word", capsys.readouterr().out)
    checks.hint("merge_step")
    checks.hint("merge_step", 9)
    out = capsys.readouterr().out
    assert exercise.hints[0] in out and "hints 1 to 3" in out
    progress_file.write_text("{broken")
    assert checks.solved() == set()
    with pytest.raises(KeyError, match=r"no exercise 'nonsense'.*merge_step"):
        checks.check("nonsense", square)


# The notebooks


def test_notebooks_are_up_to_date():
    assert build.stale() == [], "run: python exercises/build.py"


def run_cells(path, monkeypatch):
    """Execute a notebook's code cells as a kernel would, started in the notebook's folder."""
    monkeypatch.chdir(path.parent)
    names = {"__name__": "__main__"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"<{cell['id']}>", "exec"), names)


@each_topic
def test_solved_notebook_runs(stem, monkeypatch, capsys, progress_file):
    run_cells(FOLDER / "solutions" / f"{stem}.ipynb", monkeypatch)
    out = capsys.readouterr().out
    assert [f"✓ {e.name}: solved" in out for e in TOPICS[stem].EXERCISES].count(False) == 0
    assert not progress_file.exists(), "looking at a solution is not solving"


@each_topic
def test_unsolved_notebook_runs_and_asks_for_code(stem, monkeypatch, capsys):
    run_cells(FOLDER / f"{stem}.ipynb", monkeypatch)
    out = capsys.readouterr().out
    assert out.count("Not written yet") == len(TOPICS[stem].EXERCISES) and "✓" not in out


@each_topic
def test_unsolved_code_cells_do_not_give_the_solution_away(stem):
    notebook = json.loads((FOLDER / f"{stem}.ipynb").read_text(encoding="utf-8"))
    code = "".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    assert "SOLUTION" not in code
    assert code.count("raise NotImplementedError") == len(TOPICS[stem].EXERCISES)
    folded = [c for c in notebook["cells"] if c["id"].endswith("-solution")]
    assert all("".join(c["source"]).startswith("<details>") for c in folded)
    assert len(folded) == len(TOPICS[stem].EXERCISES)
