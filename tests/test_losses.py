import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minimind import losses
from minimind.losses import label_logps, labelled_places, token_logps
from minimind.stages.common import batch_logps
from minimind.stages.distill import chunked_loss, distillation_loss
from minimind.stages.pretrain import language_model_loss, next_token_loss
from minimind.stages.reason import reasoning_loss, tag_weights, weighted_token_loss

V = 120


def batch(rows=3, length=17, share=0.4):
    ids = torch.randint(V, (rows, length))
    labels = ids.masked_fill(torch.rand(rows, length) > share, -100)
    return {"input_ids": ids, "labels": labels}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 7, 1000])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_loss_and_gradient_in_chunks_are_those_of_all_logits(
    rows_per_chunk, share, small_model, monkeypatch
):
    model, data = small_model(), batch(share=share)
    expected = next_token_loss(model(data["input_ids"]), data["labels"])
    wanted = gradients(model, expected)
    monkeypatch.setattr(losses, "SMALL", 0)
    monkeypatch.setattr(losses, "ONE_CHUNK", rows_per_chunk * V)
    found = language_model_loss(model, data)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for name, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=0)


def test_log_probabilities_in_chunks(small_model, monkeypatch):
    model, data = small_model(), batch()
    wanted = token_logps(model(data["input_ids"]), data["labels"])
    monkeypatch.setattr(losses, "SMALL", 0)
    monkeypatch.setattr(losses, "ONE_CHUNK", 4 * V)
    places = labelled_places(data["labels"])
    assert 0 < len(places) < data["labels"].numel() * 0.6
    for given in ({"places": places}, {}):
        found = batch_logps(model, {**data, **given})
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_a_small_batch_is_computed_as_ever(small_model):
    """Bit for bit: the course's figures hang on it."""
    model, data = small_model(), batch()
    logits = model(data["input_ids"])
    assert torch.equal(language_model_loss(model, data)[0], next_token_loss(logits, data["labels"]))
    hidden = model.model(data["input_ids"])
    assert torch.equal(
        label_logps(hidden, model.lm_head, data["labels"]), token_logps(logits, data["labels"])
    )


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that is V wide and not a weight."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_weight = isinstance(out, torch.Tensor) and out.shape == (64, V)  # of lm_head, transposed
        if isinstance(out, torch.Tensor) and out.shape[-1:] == (V,) and not is_weight:
            self.rows = max(self.rows, out.numel() // V)
        return out


def test_reasoning_computes_its_logits_once_and_in_chunks(small_model, monkeypatch):
    model, data = small_model(), batch(share=0.6)
    tags, logits = {"a": 3, "b": 50}, model(data["input_ids"])
    labels, weights = data["labels"], tag_weights(data["labels"], [3, 50])
    every, only = tag_weights(labels, [3, 50], 1.0), tag_weights(labels, [3, 50], 2.0)
    expected = weighted_token_loss(logits, labels, weights)
    wanted = gradients(model, expected)
    for small in (losses.SMALL, 0):
        monkeypatch.setattr(losses, "SMALL", small)
        monkeypatch.setattr(losses, "ONE_CHUNK", 4 * V)
        with Largest() as largest:
            loss, metrics = reasoning_loss(model, data, tags, 10.0, "tokens")
            found = gradients(model, loss)
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
        for name, extra in (("nll", every), ("tag_nll", only - every)):
            value = weighted_token_loss(logits, labels, extra, "weights")
            torch.testing.assert_close(metrics[name], value, atol=1e-6, rtol=0)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=0)
    assert largest.rows == 4


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_distillation_has_both_models_logits_in_chunks(share, small_model, monkeypatch):
    student, teacher = small_model(), small_model(num_hidden_layers=1).requires_grad_(False)
    data = batch(share=share)
    logits = [model(data["input_ids"]) for model in (student, teacher)]
    expected, parts = distillation_loss(*logits, data["labels"], 0.3, 1.5)
    wanted = gradients(student, expected)
    for small in (losses.SMALL, 0):
        monkeypatch.setattr(losses, "SMALL", small)
        monkeypatch.setattr(losses, "ONE_CHUNK", 6 * V)
        with Largest() as largest:
            loss, found = chunked_loss(student, teacher, data, 0.3, 1.5)
            gradient = gradients(student, loss)
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
        for name in parts:
            torch.testing.assert_close(found[name], parts[name], atol=1e-6, rtol=0)
        for name in wanted:
            torch.testing.assert_close(gradient[name], wanted[name], atol=1e-6, rtol=0)
    assert largest.rows == (3 if share else 0)  # the student's, and as many of the teacher's


def test_no_more_logits_than_one_chunk_forward_or_backward(small_model, monkeypatch):
    model, data = small_model(), batch(share=1.0)
    monkeypatch.setattr(losses, "SMALL", 0)
    monkeypatch.setattr(losses, "ONE_CHUNK", 4 * V)
    with Largest() as largest:
        language_model_loss(model, data)[0].backward()
    assert largest.rows == 4
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        language_model_loss(model, data)
    logits = [shape for shape in kept if shape[-1:] == (V,) and shape != (64, V)]
    assert set(logits) == {(4, V)} and len(logits) < 4  # the last chunk's
