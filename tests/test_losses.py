import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minimind import losses
from minimind.losses import label_logps, labelled_places, token_logps
from minimind.stages.pretrain import language_model_loss, next_token_loss

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
    monkeypatch.setattr(losses, "fits_one_chunk", lambda *_: False)
    monkeypatch.setattr("minimind.stages.pretrain.fits_one_chunk", lambda *_: False)
    monkeypatch.setattr(losses, "ONE_CHUNK", rows_per_chunk * V)
    found = language_model_loss(model, data)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for name, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=0)


def test_log_probabilities_in_chunks(small_model, monkeypatch):
    model, data = small_model(), batch()
    wanted = token_logps(model(data["input_ids"]), data["labels"])
    monkeypatch.setattr(losses, "ONE_CHUNK", 4 * V)
    places = labelled_places(data["labels"])
    assert 0 < len(places) < data["labels"].numel() * 0.6
    for given in (places, None):
        found = model(data["input_ids"], labels=data["labels"], places=given)
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


def test_no_more_logits_than_one_chunk_forward_or_backward(small_model, monkeypatch):
    model, data = small_model(), batch(share=1.0)
    monkeypatch.setattr(losses, "ONE_CHUNK", 4 * V)
    monkeypatch.setattr("minimind.stages.pretrain.fits_one_chunk", losses.fits_one_chunk)
    with Largest() as largest:
        language_model_loss(model, data)[0].backward()
    assert largest.rows == 4
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        language_model_loss(model, data)
    assert not [shape for shape in kept if shape[-1:] == (V,)]
