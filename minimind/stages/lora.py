"""LoRA: teach a model something more by training an adapter, and nothing else.

Rows and loss are those of SFT. Only the adapters of `minimind.lora` get gradients, and only they
are saved: kilobytes, with a sidecar that names the base weight they belong to.

Left out: 8-bit bases (QLoRA), one learning rate for A and another for B (LoRA+).
"""

from __future__ import annotations

import os
from dataclasses import replace

from minimind.checkpoint import fingerprint, starting_weight
from minimind.config import LoRAConfig
from minimind.errors import UserError
from minimind.lora import add_lora, lora_state, trained_share
from minimind.model import MiniMind
from minimind.stages.sft import sft_task
from minimind.stages.task import Task
from minimind.tokenizer import Tokenizer


def lora_task(config: LoRAConfig, model: MiniMind, tokenizer: Tokenizer) -> Task:
    """Encode the conversations, freeze the model and add the adapters to it.

    Raises:
        UserError: there is no base to adapt, or the adapter would take the base's own name.
    """
    if config.from_weight == "none":
        raise UserError(
            "An adapter changes a trained weight, and from_weight=none is none. Give one, such as "
            "full_sft."
        )
    if config.from_weight == config.save_weight:
        raise UserError(
            f"save_weight={config.save_weight!r} is the base itself, which the adapter needs. "
            "Choose another name."
        )
    task = sft_task(config, model, tokenizer)
    add_lora(model, config.lora_r, config.lora_alpha, config.target_modules)
    return replace(task, saved=lora_state, sidecar={"lora": description(config, model)})


def description(config: LoRAConfig, model: MiniMind) -> dict:
    """Return what the sidecar says about the adapter; the base is named relative to `out_dir`."""
    base = starting_weight(config)
    return {
        "r": config.lora_r,
        "alpha": config.lora_alpha,
        "target_modules": list(config.target_modules),
        "base_weight": os.path.relpath(base, config.out_dir),
        "base_sha256": fingerprint(base),
        "trained_share": trained_share(model),
    }
