import pytest
import torch

from minimind import UserError
from minimind.lora import (
    TARGETS,
    adapters,
    add_lora,
    load_lora,
    lora_state,
    merge_lora,
    trained_share,
)

IDS = torch.arange(2 * 9).view(2, 9)


@pytest.fixture
def adapted(small_model):
    """A model with an adapter on every projection whose B is no longer zero."""

    def make(r=3, alpha=5.0, targets=TARGETS, **settings):
        model = add_lora(small_model(**settings), r, alpha, targets)
        for _, adapter in adapters(model):
            adapter.lora_B.weight.data.normal_(0, 0.1)
        return model

    return make


def test_before_the_first_step_the_model_is_what_it_was(small_model):
    model = small_model()
    logits, names = model(IDS), list(model.state_dict())
    add_lora(model, 4, 8.0, TARGETS)
    assert torch.equal(model(IDS), logits)
    assert [name for name in model.state_dict() if ".lora_" not in name] == names


def test_an_adapter_adds_scaled_b_a_x(adapted):
    name, adapter = next(iter(adapters(adapted(r=3, alpha=5.0, targets=["v_proj"]))))
    assert name == "model.layers.0.self_attn.v_proj"
    A, B, W = adapter.lora_A.weight, adapter.lora_B.weight, adapter.weight
    assert A.shape == (3, 64) and B.shape == (32, 3)  # v_proj is not square
    x = torch.randn(2, 7, 64)
    torch.testing.assert_close(adapter(x), x @ (W + 5 / 3 * B @ A).T)
    assert torch.linalg.matrix_rank(adapter.update()) == 3


@pytest.mark.parametrize("settings", [{}, {"use_moe": True, "num_experts": 3}, {"qk_norm": True}])
def test_merging_keeps_the_logits(adapted, small_model, settings):
    model = adapted(**settings)
    logits = model(IDS)
    names = list(merge_lora(model).state_dict())
    assert (model(IDS) - logits).abs().max() < 1e-5
    assert not list(adapters(model)) and names == list(small_model(**settings).state_dict())
    assert all(p.requires_grad for p in model.parameters())


def test_only_the_adapters_get_gradients(adapted):
    model = adapted(targets=["q_proj", "down_proj"])
    model(IDS).square().mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(lora_state(model)) and len(with_gradient) == 3 * 2 * 2


def test_with_b_zero_only_b_gets_a_gradient_and_with_both_zero_nothing_does(small_model):
    model = add_lora(small_model(), 4, 8.0)
    model(IDS).square().mean().backward()
    for _, adapter in adapters(model):
        assert adapter.lora_A.weight.grad.abs().max() == 0 < adapter.lora_B.weight.grad.abs().max()
        adapter.lora_A.weight.data.zero_()
    model.zero_grad()
    model(IDS).square().mean().backward()
    assert all(lora.lora_B.weight.grad.abs().max() == 0 for _, lora in adapters(model))


def test_an_adapter_travels_alone(adapted, small_model):
    model = adapted()
    base = {name: t for name, t in model.state_dict().items() if ".lora_" not in name}
    other = small_model()
    other.load_state_dict(base)
    before = other(IDS)
    load_lora(add_lora(other, 3, 5.0, TARGETS), lora_state(model))
    assert torch.equal(other(IDS), model(IDS)) and not torch.allclose(before, other(IDS))
    assert all(torch.equal(other.state_dict()[name], base[name]) for name in base)


def test_the_share_trained_is_of_the_base(small_model):
    model = small_model()
    total = model.num_parameters
    assert trained_share(model) == 1.0
    add_lora(model, 2, 4.0, ["k_proj"])
    assert trained_share(model) == 3 * 2 * (64 + 32) / total


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(r=4), r"\(3, 192\) in the file, \(4, 192\) in the model"),
        (dict(targets=["q_proj", "v_proj"]), r"\(3, 192\) in the file, none in the model"),
        (dict(hidden_size=32), r"\(3, 192\) in the file, \(3, 128\) in the model"),
        (dict(num_hidden_layers=4), r"layers.3.*none in the file"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(adapted, wrong, words):
    state, model = lora_state(adapted()), adapted(**wrong)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"my_file does not fit.*{words}"):
        load_lora(model, state, "my_file")
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((0, 16, ["q_proj"]), "lora_r=0 must be a whole number of at least 1"),
        ((1.5, 16, ["q_proj"]), "lora_r=1.5"),
        ((8, 0, ["q_proj"]), "lora_alpha=0 must be above 0"),
        ((8, 16, []), "target_modules is empty"),
        ((8, 16, ["q_porj"]), "Unknown target module 'q_porj'. Did you mean 'q_proj'"),
        ((8, 16, ["embed_tokens"]), "Unknown target module 'embed_tokens'.*Known: down_proj"),
    ],
)
def test_settings_that_make_no_adapter_are_refused(small_model, settings, words):
    with pytest.raises(UserError, match=words):
        add_lora(small_model(), *settings)


def test_two_adapters_at_once_are_refused(adapted):
    with pytest.raises(UserError, match="has adapters already"):
        add_lora(adapted())
