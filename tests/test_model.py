import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from minimind import MiniMind, ModelConfig, UserError
from minimind.model import KVCache, RMSNorm, attend

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
HUGGING_FACE = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "llama_yarn": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"rope_scaling": YARN}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"qk_norm": True}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        {"qk_norm": True, "use_moe": True, "moe_intermediate_size": 48},
    ),
}


def hugging_face_twin(model, config_class, model_class):
    c = model.config
    names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"]  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": c.rope_theta, **(c.rope_scaling or {})}
    twin = model_class(
        config_class(**{n: getattr(c, n) for n in names}, rope_parameters=rope)
    ).eval()
    ours, state = model.state_dict(), twin.state_dict()
    for name in state:
        if name.endswith("experts.gate_up_proj"):  # transformers stacks the experts in one tensor
            parts = ("gate_proj", "up_proj")
            stem = name.removesuffix("gate_up_proj")
            state[name] = torch.stack(
                [
                    torch.cat([ours[f"{stem}{e}.{p}.weight"] for p in parts])
                    for e in range(c.num_experts)
                ]
            )
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            state[name] = torch.stack(
                [ours[f"{stem}{e}.down_proj.weight"] for e in range(c.num_experts)]
            )
        else:
            state[name] = ours[name]
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("kind", HUGGING_FACE)
@torch.no_grad()
def test_logits_equal_transformers(kind, small_model):
    config_class, model_class, settings = HUGGING_FACE[kind]
    model = small_model(**settings)
    twin = hugging_face_twin(model, config_class, model_class)
    ids = torch.randint(120, (3, 70))
    torch.testing.assert_close(model(ids), twin(ids).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_default_config_equals_transformers_llama():
    model = MiniMind(ModelConfig(max_position_embeddings=512)).eval()
    twin = hugging_face_twin(model, transformers.LlamaConfig, transformers.LlamaForCausalLM)
    ids = torch.randint(6400, (2, 40))
    torch.testing.assert_close(model(ids), twin(ids).logits, atol=1e-5, rtol=0)


def test_parameter_counts_of_the_guide():
    assert MiniMind(ModelConfig()).num_parameters == 25_829_888
    assert ModelConfig().intermediate_size == 1408
    with torch.device("meta"):
        large = MiniMind(ModelConfig(hidden_size=768, num_hidden_layers=16))
    assert 103e6 < large.num_parameters < 105e6


@pytest.mark.parametrize(
    "settings", [{}, {"qk_norm": True}, {"use_moe": True}, {"rope_scaling": YARN}]
)
@torch.no_grad()
def test_cache_in_pieces_equals_the_whole(settings, small_model):
    model = small_model(**settings)
    ids = torch.randint(120, (2, 17))
    cache = KVCache(model.config, 2, 17, like=model.lm_head.weight)
    pieces = [model(piece, cache=cache) for piece in ids.split([5, 1, 7, 4], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids), atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(small_model):
    model = small_model()
    ids = torch.randint(120, (1, 9))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(13) >= 4).long()[None]
    torch.testing.assert_close(
        model(padded, attention_mask=mask)[:, 4:], model(ids), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_the_future_is_not_seen(small_model):
    model, ids = small_model(), torch.randint(120, (1, 12))
    other = ids.clone()
    other[0, 8:] = (other[0, 8:] + 1) % 120
    torch.testing.assert_close(model(ids)[:, :8], model(other)[:, :8], atol=1e-6, rtol=0)
    assert not torch.allclose(model(ids)[:, 8:], model(other)[:, 8:])


def test_rms_norm_computes_in_float32_and_keeps_the_dtype():
    norm = RMSNorm(8, 1e-5)
    x = torch.full((2, 8), 300.0, dtype=torch.float16)  # 300² overflows float16
    assert torch.isfinite(norm.to(torch.float16)(x)).all() and norm(x).dtype == torch.float16
    reference = nn.RMSNorm(8, eps=1e-5)
    y = torch.randn(3, 5, 8)
    torch.testing.assert_close(RMSNorm(8, 1e-5)(y), reference(y))


def test_router_loss_is_least_when_experts_are_used_alike(small_model):
    model = small_model(use_moe=True)
    model(torch.randint(120, (4, 20)))
    k, coefficient = model.config.num_experts_per_tok, model.config.router_aux_loss_coef
    assert model.router_loss.item() >= coefficient * k * 0.9
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data.zero_()  # equal probabilities, ties: the first k take every token
    model(torch.randint(120, (4, 20)))
    assert model.router_loss.item() == pytest.approx(coefficient * k)
    assert small_model().router_loss == 0.0


def test_every_expert_and_the_router_get_a_gradient(small_model):
    model = small_model(use_moe=True).train()
    (model(torch.randint(120, (4, 30))).square().mean() + model.router_loss).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if "mlp" in n}
    assert gradients and all(g is not None and g.abs().sum() > 0 for g in gradients.values())


@pytest.mark.parametrize(
    "settings, word",
    [({"num_attention_heads": 7}, "num_attention_heads=7"), ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
     ({"head_dim": 33}, "head_dim=33"), ({"use_moe": True, "num_experts_per_tok": 9}, "num_experts_per_tok=9")],
)  # fmt: skip
def test_impossible_shapes_are_refused(settings, word):
    with pytest.raises(UserError, match=word):
        ModelConfig(**settings)


@pytest.mark.parametrize("length, precision", [(511, torch.float32), (512, torch.bfloat16)])
def test_long_rows_attend_in_bfloat16_on_a_cpu_and_short_ones_in_float32(
    length, precision, monkeypatch
):
    seen, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *args, **kw: seen.append(q.dtype) or kernel(q, *args, **kw)
    )  # fmt: skip
    q, k, v = (torch.randn(1, heads, length, 8).bfloat16() for heads in (2, 1, 1))
    found = attend(q, k, v, mask=None)
    expected = attend(q.float(), k.float(), v.float(), mask=None)
    assert seen[0] == precision and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
