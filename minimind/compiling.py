"""`compile=1`: the blocks of a model as machine code made for them, by torch.compile.

All blocks are alike, so one is compiled and serves for all, and for every length: in a minute, not
in many. The weights keep their names, since the module is changed in place and not wrapped.

Left out: compiling embedding, loss and optimizer, which are few operations each.
"""

from __future__ import annotations

import time

import torch

from minimind.config import TrainConfig
from minimind.errors import UserError
from minimind.model import MiniMind
from minimind.precision import autocast


def compile_blocks(model: MiniMind, config: TrainConfig, backend: str = "inductor") -> float:
    """Compile the blocks in place, for training and for measuring; return the seconds it took.

    A trial pass makes the code now, so that no step has to wait for it. It leaves weights,
    gradients and random numbers as they were. Call it after adapters have been added.

    Raises:
        UserError: there is no compiler here, or it failed.
    """
    started, was_training = time.monotonic(), model.training
    for block in model.model.layers:
        block.compile(dynamic=True, backend=backend)
    try:
        with torch.random.fork_rng():
            for training in (False, True):
                _trial_pass(model.train(training), config)
    except RuntimeError as error:
        raise UserError(
            f"compile=1 failed here ({str(error).strip().splitlines()[0]}). It needs a C++ compiler, such "
            "as the package g++; compile=0 works everywhere."
        ) from error
    finally:
        model.train(was_training)
    return time.monotonic() - started


def _trial_pass(model: MiniMind, config: TrainConfig) -> None:
    """Read random tokens as a step of training does, or without gradients in eval mode."""
    shape = 5, 37  # like nothing else in the model, or the code would hold for equal sizes only
    ids = torch.randint(model.config.vocab_size, shape, device=model.device)
    with autocast(config, model.device), torch.set_grad_enabled(model.training):
        logits = model(ids)
    if model.training:
        logits.float().mean().backward()
        model.zero_grad(set_to_none=True)
