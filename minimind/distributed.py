"""Many processes that train one model: `torchrun --nproc_per_node=4 -m minimind pretrain …`

Every process holds the whole model and takes its part of every step's batches; the gradients are
summed, so that all make the same step (data parallel). With one process each function here does
nothing and returns what it was given.

PyTorch's DistributedDataParallel is left out: it weighs processes equally, though their batches hold
unequal numbers of labelled tokens, and it misses what reinforcement learning does between two
steps. Left out too: several processes for one layer (tensor and pipeline parallel).
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from tqdm.auto import tqdm

from minimind.data import Batch, Batches
from minimind.errors import UserError
from minimind.model import MiniMind

TIMEOUT = timedelta(minutes=30)  # for what only one process does: preparing data, a slow disk
BUCKET = 32_000_000  # numbers in one message (128 MB): few messages, little extra memory
SHARDED_STAGES = ("pretrain", "sft", "dpo", "reason", "distill")
ended_well = False
Part, Item = TypeVar("Part"), TypeVar("Item")


def start() -> None:
    """Join the other processes, if torchrun has started several; once is enough.

    UserError if they cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or (dist.is_available() and dist.is_initialized()):
        return
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"Process {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} does not reach the others "
            f"({str(error).splitlines()[0]}). Start them with torchrun; see docs/many_machines.md."
        ) from error
    atexit.register(leave)  # so early that what others have registered is done before it


def leave() -> None:
    """Part from the other processes; a program that ended well stops here.

    Python would take itself apart while threads of PyTorch's exchanges still run. One run in
    thirty ended so with "terminate called without an active exception" after all was saved.
    """
    dist.destroy_process_group()
    if ended_well:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def end_well() -> None:
    """Note that the program has done all it had to do."""
    global ended_well
    ended_well = True


def size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_first() -> bool:
    """Return whether this process is the one that writes and prints."""
    return rank() == 0


def own_device(name: str) -> str:
    """Return the name of this process's device: "cuda" is the GPU of its number on its machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and size() > 1 else name


def own_noise(seed: int, step: int) -> None:
    """Give every process but the first random numbers of its own, for dropout.

    Until then all had the same, so that all made the same starting weights.
    """
    if rank():
        torch.manual_seed(seed + 1_000_003 * (rank() + size() * step))


def say(text: str) -> None:
    """Print beside the progress bar, once for all processes."""
    if is_first():
        tqdm.write(text)


def may_complain() -> bool:
    """Return True to the first process that asks, so that an error of all is printed once."""
    if size() == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("complaints", 1) == 1
    except RuntimeError:  # the process that kept the count is gone
        return True


@contextmanager
def together() -> Iterator[None]:
    """Turn the failure of an exchange into an error that says what to do."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            "Another process of this run has stopped or does not answer; if it said why, that stands "
            "above. Once that is mended, --from_resume 1 goes on from the last resume point."
        ) from error


def wait() -> None:
    """Wait until all processes are here."""
    gathered(None)


def gathered(value: Part) -> list[Part]:
    """Return the value of every process, in their order. For small things: they travel pickled."""
    if size() == 1:
        return [value]
    found: list = [None] * size()
    with together():
        dist.all_gather_object(found, value)
    return found


def check_same_step(step: int, folder: Path) -> None:
    """UserError unless all processes go on from the same step, which they have read in `folder`."""
    steps = gathered(step)
    if len(set(steps)) > 1:
        raise UserError(
            f"The processes find resume points of different steps in {folder} ({steps}; 0: none). Let "
            "out_dir be a folder that all machines share, or copy the newest points to each."
        )


def total(number: float) -> float:
    """Return the sum of a number over all processes."""
    return number if size() == 1 else _reduced(number, dist.ReduceOp.SUM)


def largest(number: int) -> int:
    """Return the largest of the numbers of all processes."""
    return number if size() == 1 else int(_reduced(number, dist.ReduceOp.MAX))


def _reduced(number: float, operation: dist.ReduceOp) -> float:
    found = torch.tensor(float(number), dtype=torch.float64)
    with together():
        dist.all_reduce(found, operation)
    return float(found)


def of_first(value: Part) -> Part:
    """Return the value of the first process: what must not differ in the last bit."""
    return gathered(value)[0]


def in_parts(work: Callable[[Sequence[Item], int], Part], items: Sequence[Item]) -> list[Part]:
    """Share items out, call `work(part, number of its first item)`; return the results of all, in order.

    A process without a part, as there are fewer items than processes, adds no result.
    """
    start, end = (len(items) * r // size() for r in (rank(), rank() + 1))
    found = gathered(work(items[start:end], start) if start < end else None)
    return [part for part in found if part is not None]


def shared(batches: Batches | Sequence[Batch], numbers: Sequence[int]) -> list[Batch]:
    """Return this process's part of the batches with these numbers: every N-th of them.

    All get equally many, since all must take part in every exchange: where the numbers do not go
    round, the rest get an idle batch, whose loss counts for nothing.
    """
    mine = [batches[number] for number in numbers[rank() :: size()]]
    if len(mine) < -(-len(numbers) // size()):
        mine.append({**batches[numbers[0]], "idle": torch.tensor(True)})
    return mine


def sum_figures(figures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the sums of scalars over all processes, by name; all must have the same names."""
    if size() == 1:
        return figures
    names = sorted(figures)
    values = torch.stack([figures[name].float() for name in names])
    with together():
        dist.all_reduce(values)
    return dict(zip(names, values, strict=True))


def sum_gradients(model: nn.Module) -> None:
    """Replace the gradients by their sums over all processes, many in one message."""
    if size() == 1 or is_sharded(model):  # the latter sums them in its backward pass
        return
    bucket: list[nn.Parameter] = []
    trained = [p for p in model.parameters() if p.grad is not None]
    for number, parameter in enumerate(trained, start=1):
        bucket.append(parameter)
        if number == len(trained) or sum(p.numel() for p in bucket) > BUCKET:
            _sum_bucket(bucket)
            bucket = []


def _sum_bucket(parameters: Sequence[nn.Parameter]) -> None:
    flat = torch.cat([p.grad.flatten() for p in parameters])
    with together():
        dist.all_reduce(flat)
    sums = flat.split([p.numel() for p in parameters])
    for parameter, gradient in zip(parameters, sums, strict=True):
        parameter.grad = gradient.view_as(parameter)


def shard(model: MiniMind, stage: str, optimizer: str, dtype: str) -> None:
    """Keep only this process's share of every weight, in place: FSDP2 (arXiv 2304.11277).

    A block's weights are put together for its forward and backward pass, then dropped again.
    Gradients and optimizer states are shares too. Make the optimizer after it.

    Raises:
        UserError: one process only, or a stage, optimizer or dtype that needs whole weights.
    """
    wanted = {
        f"stage={stage}": stage in SHARDED_STAGES,
        f"optimizer={optimizer}": optimizer == "adamw",
        f"dtype={dtype}": dtype != "float16",
    }
    faults = [setting for setting, good in wanted.items() if not good]
    if faults or size() == 1:
        raise UserError(
            f"fsdp=1 cannot be used with {', '.join(faults) or 'one process'}. It needs torchrun with "
            f"several processes, one of the stages {', '.join(SHARDED_STAGES)}, optimizer=adamw, and "
            "bfloat16 or float32. fsdp=0 works everywhere."
        )
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(model.device.type, (size(),))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
        part.set_force_sum_reduction_for_comms(True)  # a sum of gradients, as everywhere here
        part.set_gradient_divide_factor(1.0)


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` was called on the model."""
    return any(is_share(parameter) for parameter in model.parameters())


def is_share(value: object) -> bool:
    """Return whether a tensor is one process's share of a larger one."""
    return hasattr(value, "full_tensor")  # a DTensor; its module takes long to import


def whole(value: object) -> object:
    """Return a tensor, or a dict or list of such, with its shares put together. All must call it."""
    if isinstance(value, dict):
        return {name: whole(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [whole(inner) for inner in value]
    return value.full_tensor() if is_share(value) else value


def unsharded(model: MiniMind) -> MiniMind:
    """Return the model, or if it is sharded a plain one with its weights. All must call it."""
    if not is_sharded(model):
        return model
    plain = MiniMind(model.config).to(model.device)
    plain.load_state_dict(whole(model.state_dict()))
    return plain


def share_like(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's share of a whole tensor, if `like` is one and has its shape."""
    if not is_share(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def share_weights(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a whole state dict as the model wants it: in shares, if the model is sharded."""
    wanted = model.state_dict()
    return {name: share_like(value, wanted.get(name, value)) for name, value in state.items()}


def share_states(optimizer: torch.optim.Optimizer) -> None:
    """Cut an optimizer's states, which were loaded whole, like the weights they belong to."""
    for parameter, states in optimizer.state.items():
        states.update({name: share_like(value, parameter) for name, value in states.items()})
