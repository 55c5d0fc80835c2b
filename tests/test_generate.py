import sys

import pytest
import torch

from minimind import UserError, chat, generate
from minimind.generate import (
    next_token_probabilities,
    row_streams,
    sample,
    sample_rollouts,
    stream,
)
from minimind.reader import Reader


@torch.no_grad()
def one_by_one(model, prompt, steps, eos_id):
    ids, new = list(prompt), []
    while len(new) < steps and (not new or new[-1] != eos_id):
        new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
    return new


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}, {"use_moe": True}])
def test_batched_and_cached_equals_one_by_one_without_cache(settings, small_model):
    model = small_model(**settings)
    prompts = [torch.randint(3, 120, (n,)).tolist() for n in (3, 11, 1, 6, 11, 8)]
    expected = [one_by_one(model, p, 24, eos_id=2) for p in prompts]
    assert generate(model, prompts, 24, temperature=0, eos_id=2) == expected
    eos = expected[1][4]  # make one row end early: the others must not notice
    expected = [one_by_one(model, p, 24, eos_id=eos) for p in prompts]
    assert len({len(e) for e in expected}) > 1
    assert generate(model, prompts, 24, temperature=0, eos_id=eos) == expected


def test_a_rows_sample_does_not_depend_on_its_neighbours(small_model):
    model = small_model()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    together = generate(model, prompts, 12, seed=7)
    assert together[0] == generate(model, prompts[:1], 12, seed=7)[0]
    assert together[:2] == generate(model, prompts[:2], 12, seed=7)
    assert together == generate(model, prompts, 12, seed=7) != generate(model, prompts, 12, seed=8)


def test_samples_follow_the_distribution():
    probabilities = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).repeat(20000, 1)
    counts = sample(probabilities, torch.rand(20000)).bincount(minlength=4) / 20000
    torch.testing.assert_close(counts, probabilities[0], atol=0.02, rtol=0)
    assert counts[1] == 0
    edge = sample(probabilities[:2], torch.tensor([0.0, 1 - 1e-7]))
    assert edge.tolist() == [0, 3]


def test_temperature_top_k_and_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    full = next_token_probabilities(logits)
    torch.testing.assert_close(full, logits.softmax(-1))
    torch.testing.assert_close(next_token_probabilities(logits, 0.5), (logits / 0.5).softmax(-1))
    assert next_token_probabilities(logits, 0).tolist() == [[1, 0, 0, 0]]
    assert (next_token_probabilities(logits, top_k=2) > 0).tolist() == [[True, True, False, False]]
    assert (next_token_probabilities(logits, top_p=0.64) > 0).tolist() == [
        [True, False, False, False]
    ]
    assert (next_token_probabilities(logits, top_p=0.65) > 0).tolist() == [
        [True, True, False, False]
    ]
    nucleus = next_token_probabilities(logits, top_p=0.8)
    torch.testing.assert_close(nucleus.sum(-1), torch.ones(1))
    torch.testing.assert_close(nucleus[0, 0] / nucleus[0, 1], full[0, 0] / full[0, 1])


def test_the_model_stays_in_its_mode(small_model):
    model = small_model().train()
    generate(model, [[1, 2]], 2)
    assert model.training


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_empty_prompts_are_refused(prompts, small_model):
    with pytest.raises(UserError, match="prompt"):
        generate(small_model(), prompts, 3)


def test_a_prompt_that_leaves_no_room_is_refused(small_model):
    with pytest.raises(UserError, match="max_position_embeddings=16"):
        generate(small_model(max_position_embeddings=16), [[1] * 10], 7)


@pytest.mark.parametrize("size", [1.0, 0.7, 1 + 2**-23, 1 / 3])
def test_no_token_without_probability_is_sampled_at_the_edges(size):
    probabilities = torch.tensor([[0.0, size / 2, size / 2, 0.0]] * 2)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.double)
    assert sample(probabilities, edges).tolist() == [1, 2]


@pytest.mark.parametrize(
    "change, words",
    [({"max_new_tokens": 0}, "max_new_tokens=0"), ({"seed": -1}, "seed=-1"), ({"top_p": 0.0}, r"top_p=0\.0"),
     ({"top_p": 1.2}, r"top_p=1\.2"), ({"top_p": float("nan")}, "top_p=nan"), ({"top_k": -3}, "top_k=-3"),
     ({"temperature": -0.5}, r"temperature=-0\.5"), ({"temperature": float("inf")}, "temperature=inf")],
)  # fmt: skip
def test_settings_that_nothing_can_be_sampled_with_are_named(change, words, small_model):
    settings = {"max_new_tokens": 3, **change}
    with pytest.raises(UserError, match=words):
        generate(small_model(), [[1, 2]], **settings)
    with pytest.raises(UserError, match=words):
        next(stream(small_model(), [1, 2], **settings))
    if "top_p" not in change and "top_k" not in change and "temperature" not in change:
        with pytest.raises(UserError, match=words):
            sample_rollouts(small_model(), [[1, 2]], 2, eos_id=2, **settings)


def test_chat_returns_text(small_model, tokenizer):
    model = small_model(vocab_size=tokenizer.vocab_size)
    answer = chat(model, tokenizer, [{"role": "user", "content": "Hello!"}], max_new_tokens=5)
    assert isinstance(answer, str) and "<|im_end|>" not in answer


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14]]
SETTINGS = [{}, {"qk_norm": True, "tie_word_embeddings": False}, {"use_moe": True}]


def fresh_logps(model, rollouts):
    logits = model(rollouts.input_ids)[:, :-1].log_softmax(-1)
    logps = logits.gather(-1, rollouts.input_ids[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(logps, (1, 0)) * rollouts.mask


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 6], [7, 8], [9, 3]]])
def test_logps_of_the_sampling_equal_those_of_a_fresh_forward(settings, prompts, small_model):
    model = small_model(vocab_size=20, **settings)
    rollouts = sample_rollouts(model, prompts, 5, 9, eos_id=2, seed=3)
    assert len({len(c) for c in rollouts.completions}) > 1  # some ended, some were cut
    torch.testing.assert_close(rollouts.logps, fresh_logps(model, rollouts), atol=1e-4, rtol=0)
    assert (rollouts.logps[rollouts.mask] < 0).all()


def test_rows_stand_in_order_and_need_no_mask(small_model):
    rollouts = sample_rollouts(small_model(vocab_size=20), PROMPTS, 4, 9, eos_id=2, seed=3)
    assert rollouts.prompt_ids == [p for p in PROMPTS for _ in range(4)]
    for n, (prompt, answer) in enumerate(
        zip(rollouts.prompt_ids, rollouts.completions, strict=True)
    ):
        length = len(prompt) + len(answer)
        assert rollouts.prompt_lengths[n] == len(prompt)
        assert rollouts.input_ids[n].tolist() == prompt + answer + [0] * (
            rollouts.input_ids.shape[1] - length
        )
        sampled = list(range(len(prompt), length))
        assert rollouts.mask[n].nonzero()[:, 0].tolist() == sampled
        assert bool(rollouts.finished[n]) == (answer[-1] == 2)


def test_an_answer_that_never_ends_is_cut_and_counted(small_model):
    model = small_model()
    rollouts = sample_rollouts(model, [[5, 6], [7]], 3, 6, eos_id=120, seed=0)
    assert rollouts.truncated.all() and [len(c) for c in rollouts.completions] == [6] * 6
    eos = rollouts.completions[0][5]
    again = sample_rollouts(model, [[5, 6], [7]], 3, 6, eos_id=eos, seed=0)
    assert again.completions[0] == rollouts.completions[0]
    assert again.finished[0]  # its very last token was the end: not cut


def test_a_group_is_what_the_prompt_alone_repeated_would_sample(small_model):
    model = small_model(vocab_size=20)
    repeated = [p for p in PROMPTS for _ in range(3)]
    rollouts = sample_rollouts(model, PROMPTS, 3, 12, eos_id=2, seed=5)
    assert rollouts.completions == generate(model, repeated, 12, eos_id=2, seed=5)
    assert len({tuple(c) for c in rollouts.completions}) == 9


def test_rollouts_do_not_depend_on_other_prompts(small_model):
    model = small_model(vocab_size=20)
    together = sample_rollouts(model, PROMPTS, 3, 12, eos_id=2, seed=5)
    alone = sample_rollouts(model, PROMPTS[:1], 3, 12, eos_id=2, seed=5)
    assert alone.completions == together.completions[:3]


def test_rollouts_follow_the_trained_distribution(small_model):
    model = small_model(vocab_size=5)
    rollouts = sample_rollouts(model, [[1, 3]], 4000, 1, eos_id=2, seed=1)
    counts = torch.tensor([c[0] for c in rollouts.completions]).bincount(minlength=5) / 4000
    expected = model(torch.tensor([[1, 3]]))[0, -1].softmax(-1)
    torch.testing.assert_close(counts, expected, atol=0.03, rtol=0)


def test_streams_of_two_seeds_have_nothing_in_common():
    first, second = row_streams(4, 6, seed=1), row_streams(4, 6, seed=2)
    assert not set(first.flatten().tolist()) & set(second.flatten().tolist())
    assert torch.equal(first[:2], row_streams(2, 6, seed=1))
    assert torch.equal(row_streams(2, 9, seed=1)[:, :6], first[:2])


def test_rows_that_end_leave_the_batch(small_model, monkeypatch):
    sizes = []
    read = Reader.read
    monkeypatch.setattr(
        Reader, "read", lambda r, i, *rest: sizes.append(len(i)) or read(r, i, *rest)
    )
    rollouts = sample_rollouts(small_model(vocab_size=20), PROMPTS, 8, 12, eos_id=2, seed=0)
    lengths = torch.tensor([len(c) for c in rollouts.completions])
    assert sizes == [3, *(int((lengths > s).sum()) for s in range(1, int(lengths.max())))]


def test_weights_that_have_changed_are_read_anew(small_model):
    model = small_model(vocab_size=20)
    before = generate(model, PROMPTS, 8, temperature=0)
    model.model.layers[0].mlp.down_proj.weight.data.neg_()
    after = generate(model, PROMPTS, 8, temperature=0)
    assert before != after == [one_by_one(model, p, 8, eos_id=None) for p in PROMPTS]


def test_autocast_is_taken_over(small_model):
    model = small_model(vocab_size=20, qk_norm=True)
    with torch.autocast("cpu", torch.bfloat16):
        rollouts = sample_rollouts(model, PROMPTS, 6, 9, eos_id=2, seed=3)
        fresh = fresh_logps(model, rollouts).float()
    difference = (rollouts.logps - fresh).abs().max()
    assert 1e-5 < difference < 0.15  # bfloat16 has three digits; sums in another order differ
    exact = (rollouts.logps - fresh_logps(model, rollouts)).abs().mean()
    assert (rollouts.logps - fresh).abs().mean() < exact


def test_compiled_steps_sample_the_same(small_model, monkeypatch):
    eager = torch.compile(Reader.read, dynamic=False, backend="eager")
    monkeypatch.setattr(sys.modules["minimind.generate"], "compiled_read", lambda: eager)
    model = small_model(vocab_size=20)
    plain = sample_rollouts(model, PROMPTS, 3, 9, eos_id=2, seed=3)
    compiled = sample_rollouts(model, PROMPTS, 3, 9, eos_id=2, seed=3, compiled=True)
    assert compiled.completions == plain.completions
    torch.testing.assert_close(compiled.logps, plain.logps, atol=1e-5, rtol=0)


def test_rollouts_of_other_prompts_and_weights_use_the_same_code(small_model, monkeypatch):
    torch._dynamo.reset()
    graphs = []
    count = lambda graph, inputs: graphs.append(1) or graph.forward  # noqa: E731
    step = torch.compile(Reader.read, dynamic=False, backend=count)
    monkeypatch.setattr(sys.modules["minimind.generate"], "compiled_read", lambda: step)
    model = small_model(vocab_size=20)
    for prompts in (PROMPTS, [[*p, 5, 6, 7] for p in PROMPTS], [p[-1:] for p in PROMPTS]):
        plain = sample_rollouts(model, prompts, 3, 20, eos_id=2, seed=3)
        compiled = sample_rollouts(model, prompts, 3, 20, eos_id=2, seed=3, compiled=True)
        assert compiled.completions == plain.completions
        model.model.layers[0].mlp.down_proj.weight.data.neg_()
    assert len(graphs) == 1


def test_no_generation_is_refused(small_model):
    with pytest.raises(UserError, match="num_generations=0"):
        sample_rollouts(small_model(vocab_size=20), PROMPTS, 0, 4, eos_id=2)
