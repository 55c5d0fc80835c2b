"""Muon (arXiv 2502.16982): momentum whose step is made orthogonal, for the matrices of the blocks.

`torch.optim.Muon` takes the same step, but always in bfloat16. A CPU that does not compute in
bfloat16, as in most laptops, needs sixty times as long for that as in float32, and spends two
thirds of a pretraining step on it. Ours takes the format that is fast on its device.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt

import torch
from torch import Tensor, nn

from minimind.precision import pick_dtype

QUINTIC = (3.4445, -4.7750, 2.0315)  # pushes every singular value in (0, 1] to about 1


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return about U·Vᵀ for a matrix U·S·Vᵀ (m, n): every direction as strong as every other.

    Newton-Schulz: with X = matrix / ‖matrix‖, repeat X ← a·X + b·(X·Xᵀ)·X + c·(X·Xᵀ)²·X, which
    leaves U and V alone and applies a·s + b·s³ + c·s⁵ to each singular value s. After five rounds
    those from 0.003 to 1 lie between 0.68 and 1.21, near enough for a step. No decomposition is
    needed, only products of matrices.
    """
    a, b, c = QUINTIC
    x = matrix.to(pick_dtype("auto", matrix.device))
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x  # X·Xᵀ is then the smaller square
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """W ← (1 - lr·decay)·W - lr·0.2·√max(m, n)·orthogonalised(g + μ·(buffer - g)).

    `buffer` is the running mean of the gradients g; the look ahead is Nesterov's. The factor gives
    a step the size of AdamW's (root mean square 0.2), so one learning rate serves both optimizers
    (arXiv 2502.16982, section 2.2). Every parameter must be a matrix (m, n).
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                update = orthogonalised(weight.grad.lerp(buffer, momentum))
                weight.mul_(1 - lr * group["weight_decay"])
                weight.add_(update, alpha=-lr * 0.2 * sqrt(max(weight.shape)))
