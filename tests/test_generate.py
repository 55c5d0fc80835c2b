import pytest
import torch

from minimind import UserError, chat, generate
from minimind.generate import next_token_probabilities, sample


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


def test_chat_returns_text(small_model, tokenizer):
    model = small_model(vocab_size=tokenizer.vocab_size)
    answer = chat(model, tokenizer, [{"role": "user", "content": "Hello!"}], max_new_tokens=5)
    assert isinstance(answer, str) and "<|im_end|>" not in answer
