"""Muon: the library's step in the library's precision, and orthogonal in the one that is fast here."""

import pytest
import torch
from torch import nn

from minimind import muon
from minimind.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(32, 32), (24, 64), (64, 24)])
def test_equals_the_step_of_torch(shape, monkeypatch):
    """In bfloat16, which is all that torch.optim.Muon can do, bit for bit over several steps."""
    monkeypatch.setattr(muon, "pick_dtype", lambda name, device: torch.bfloat16)
    torch.manual_seed(0)
    mine, theirs = (nn.Parameter(w.clone()) for w in [torch.randn(shape)] * 2)
    settings = {"lr": 0.02, "weight_decay": 0.1}
    ours = Muon([mine], **settings)
    torchs = torch.optim.Muon([theirs], **settings, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        gradient = torch.randn(shape)
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours.step()
        torchs.step()
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("shape", [(32, 32), (24, 64), (64, 24)])
def test_every_direction_becomes_about_as_strong(shape):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    strengths = torch.logspace(0, -1.5, min(shape))
    result = orthogonalised(u @ strengths.diag() @ v).float()
    after = torch.linalg.svdvals(result)
    assert after.min() > 0.6 and after.max() < 1.3
    assert torch.linalg.matrix_norm(u.T @ result @ v.T - (u.T @ result @ v.T).diag().diag()) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_products_run_in_the_format_that_is_fast_on_the_device(dtype, monkeypatch):
    monkeypatch.setattr(muon, "pick_dtype", lambda name, device: dtype if name == "auto" else None)
    assert orthogonalised(torch.randn(8, 8)).dtype == dtype


def test_a_weight_without_gradient_stays():
    weights = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    weights[0].grad = torch.eye(4)
    Muon(weights, lr=0.1, weight_decay=0.5).step()
    assert not torch.equal(weights[0], torch.ones(4, 4))
    assert torch.equal(weights[1], torch.ones(4, 4))
