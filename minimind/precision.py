"""In which number format matrix products run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from minimind.config import TrainConfig


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products; "auto" is bfloat16 where the hardware computes in it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return (
        torch.bfloat16
        if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        else torch.float32
    )


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """Return the context in which matrix products run in the chosen dtype; weights stay float32."""
    dtype = pick_dtype(config.dtype, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
