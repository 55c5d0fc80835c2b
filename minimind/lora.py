"""Low-rank adapters: learn an update of a few thousand numbers beside weights that stay frozen.

    y = x·Wᵀ + (alpha/r) · (x·Aᵀ)·Bᵀ        W (out, in) frozen, A (r, in), B (out, r) trained

(LoRA, arXiv 2106.09685, section 4.1). B is zero at the start, so the model begins as it was.
Reads top to bottom: an adapted projection, add, save, load, merge. Names are peft's, without its
prefix: `model.layers.0.self_attn.q_proj.lora_A.weight`.

Left out: dropout on the adapter, biases, several adapters at once, adapters on embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.errors import UserError, bad_value
from minimind.model import MiniMind

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen projection and its trained low-rank update.

    Holds the very tensor of `base` under the same name, `weight`; so adding an adapter moves no
    weight and renames none. A starts random (uniform, as any linear layer), B at zero: with both
    at zero neither would ever get a gradient, with neither at zero the model would start broken.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__()
        out_size, in_size = base.weight.shape
        like = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.weight = base.weight
        self.lora_A = nn.Linear(in_size, r, **like)
        self.lora_B = nn.Linear(r, out_size, **like)
        nn.init.zeros_(self.lora_B.weight)
        self.scaling = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.lora_B(self.lora_A(x)) * self.scaling

    @torch.no_grad()
    def update(self) -> Tensor:
        """Return what the adapter adds to the weight: (alpha/r)·B·A, (out, in), rank at most r."""
        return self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    def merged(self) -> nn.Linear:
        """Return one plain projection with weight W + (alpha/r)·B·A."""
        plain = nn.Linear(*self.weight.shape[::-1], bias=False, device="meta")
        plain.weight = nn.Parameter(self.weight.detach() + self.update())
        return plain


def add_lora(
    model: MiniMind, r: int = 8, alpha: float = 16, target_modules: Sequence[str] = TARGETS[:4]
) -> MiniMind:
    """Freeze the model and put an adapter on every projection of these names, in place.

    Args:
        r: rank of the update. alpha: its strength; the update is scaled by alpha/r.
        target_modules: among q_proj k_proj v_proj o_proj gate_proj up_proj down_proj. In a
            mixture of experts the last three stand for those of every expert.

    Raises:
        UserError: a rank below 1, an alpha that is not above 0, an unknown or empty target, or
            adapters are there already.
    """
    targets = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    check_lora(r, alpha, targets)
    if any(adapters(model)):
        raise UserError("The model has adapters already. Merge them first (merge_lora).")
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in targets:
                setattr(parent, name, LoRALinear(child, r, alpha))
    return model


def check_lora(r: int, alpha: float, targets: Sequence[str]) -> None:
    """UserError if an adapter cannot be made of these settings."""
    if r < 1 or r != int(r):
        raise UserError(f"lora_r={r} must be a whole number of at least 1: the rank of the update.")
    if not alpha > 0:
        raise UserError(f"lora_alpha={alpha} must be above 0; it scales the update by alpha/r.")
    if not targets:
        raise UserError(f"target_modules is empty. Choose among {', '.join(TARGETS)}.")
    for name in targets:
        if name not in TARGETS:
            raise bad_value("target module", name, TARGETS)


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Yield every adapted projection with its name."""
    return ((n, module) for n, module in model.named_modules() if isinstance(module, LoRALinear))


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter alone: the A and B of every adapted projection."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}


def load_lora(model: nn.Module, state: dict[str, Tensor], source: object = "The adapter") -> None:
    """Copy an adapter into a model that `add_lora` has prepared; every matrix must fit.

    Raises:
        UserError: another rank, other targets, another base; the first misfit is named.
    """
    given, wanted = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (state, lora_state(model))
    )
    wrong = sorted(n for n in given.keys() | wanted.keys() if given.get(n) != wanted.get(n))
    if wrong:
        first = wrong[0]
        raise UserError(
            f"{source} does not fit this model: {len(wrong)} matrices differ, such as {first}: "
            f"{given.get(first, 'none')} in the file, {wanted.get(first, 'none')} in the model. An "
            "adapter belongs to one base, one lora_r and one set of target_modules; give its own."
        )
    model.load_state_dict(state, strict=False)


def merge_lora(model: MiniMind) -> MiniMind:
    """Add every update to its weight and drop the adapters, in place: a plain model, same logits."""
    for name, adapter in list(adapters(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapter.merged())
    return model.requires_grad_(True)


def trained_share(model: nn.Module) -> float:
    """Return trained numbers over the numbers of the model without its adapters."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapter = sum(tensor.numel() for tensor in lora_state(model).values())
    return trained / (sum(p.numel() for p in model.parameters()) - adapter)
