import pytest
import torch

from minimind import UserError
from minimind.bench import bench_generate, sampling_text, transformers_twin
from minimind.config import stage_config


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"qk_norm": True, "tie_word_embeddings": False}])
def test_the_comparison_is_with_the_same_model(settings, small_model):
    model, ids = small_model(**settings), torch.randint(120, (2, 9))
    torch.testing.assert_close(transformers_twin(model)(ids).logits, model(ids), atol=1e-5, rtol=0)


def test_both_sides_sample_as_many_tokens(monkeypatch):
    sampled = []
    import transformers

    generate = transformers.GenerationMixin.generate

    def watched(self, ids, **settings):
        output = generate(self, ids, **settings)
        sampled.append((len(output), output.shape[1] - ids.shape[1]))
        return output

    monkeypatch.setattr(transformers.GenerationMixin, "generate", watched)
    config = stage_config("pretrain", "tiny")
    found = bench_generate(config, vocab_size=64, rows=16, length=4, new_tokens=5, repeats=1)
    assert set(sampled) == {(16, 5)} and [speed.prompts for speed in found] == [16, 2]
    assert all(speed.ours > 0 and speed.transformers > 0 for speed in found)
    assert sampling_text(found).count("times as fast") == 2


def test_experts_are_not_compared(small_model):
    with pytest.raises(UserError, match="use_moe"):
        transformers_twin(small_model(use_moe=True, qk_norm=True))
