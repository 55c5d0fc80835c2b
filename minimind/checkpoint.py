"""Weights and resume points on disk, written so that a crash never costs what was there before.

- `out/<weight>_<hidden>.pth`: a bare float32 state dict with Hugging Face's names; beside it
  `<same>.json` with the config, the tokenizer, the lineage of stages and the metrics.
- `checkpoints/<weight>_<hidden>_resume.pth`: all that the next step depends on; beside it
  `<weight>_<hidden>_resume_before.pth`, the point before that, for when the newest is damaged.

Everything is read with `weights_only=True`: a file can hold numbers, not code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from minimind import distributed
from minimind.config import ModelConfig, TrainConfig
from minimind.errors import UserError
from minimind.lora import add_lora, load_lora, merge_lora
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], keep: Path | None = None
) -> None:
    """Write a file whole or not at all: into a neighbour first, which then takes its name.

    Args:
        keep: the name under which an older file is kept; without it, it is replaced.

    Raises:
        UserError: the disk is full or the folder cannot be written; an older file stays as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        # "x": a new file, so never through a link that somebody put there.
        with open(partial, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps "no space left" in RuntimeError
        with suppress(OSError):
            partial.unlink()
        raise UserError(
            f"Could not write {path}: {error}. What was there before is unharmed. Free some space "
            "or choose another out_dir."
        ) from error


def weight_path(out_dir: str | Path, weight: str, hidden_size: int) -> Path:
    """Return `<out_dir>/<weight>_<hidden>.pth`."""
    return Path(out_dir) / f"{weight}_{hidden_size}.pth"


def save_weight(
    path: Path, model: MiniMind, tokenizer: Tokenizer, stages: list[dict], metrics: dict,
    saved: Callable[[MiniMind], dict[str, Tensor]] | None = None, more: dict | None = None,
) -> None:  # fmt: skip
    """Write the state dict (or the part of it that `saved` returns) and its sidecar json."""
    state = saved(model) if saved else model.state_dict()
    state = {name: tensor.detach().float().cpu() for name, tensor in state.items()}
    sidecar = {
        **(more or {}),
        "config": model.config.to_dict(),
        "stages": stages,
        "metrics": metrics,
        "tokenizer": json.loads(tokenizer.to_json()),
    }
    text = json.dumps(sidecar, ensure_ascii=False, indent=1)
    write_atomically(path, lambda file: torch.save(state, file))
    write_atomically(path.with_suffix(".json"), lambda file: file.write(text.encode()))


def before(path: Path) -> Path:
    """Return where the resume point before the newest is kept."""
    return path.with_name(f"{path.stem}_before.pth")


def write_resume(path: Path, point: dict) -> None:
    """Write a resume point and keep the one before it. UserError if it cannot be written."""
    write_atomically(path, lambda file: torch.save(point, file), keep=before(path))


def newest_resume(path: Path) -> tuple[dict, Path] | None:
    """Return the newest resume point that is whole and its file; None if there is none at all.

    Raises:
        UserError: there are some and all are damaged.
    """
    damaged = []
    for file in filter(Path.is_file, (path, before(path))):
        try:
            point = read_tensors(file)
            if damaged:
                distributed.say(
                    f"Warning: {damaged[0]} is damaged. Going on from the point before: {file}, step "
                    f"{point['step']}, which takes its place."
                )
            return point, file
        except UserError:
            damaged.append(file)
    if damaged:
        raise UserError(
            f"No resume point can be read: {' and '.join(map(str, damaged))} "
            "are damaged. Start anew with from_resume=0, or copy one of them again."
        )
    return None


def read_tensors(path: Path) -> dict:
    """Return what `torch.save` wrote, numbers only. UserError if the file is damaged.

    The file is a zip archive with a checksum for each tensor, which `torch.load` does not look at,
    and nothing in it is compressed: what is read takes no more memory than the file has bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size, records = path.stat().st_size, archive.infolist()
            if any(record.compress_type for record in records):
                raise ValueError("it is compressed, which torch.save never does")
            if sum(record.file_size for record in records) > size:
                raise ValueError(f"its records claim more than its {size} bytes")
            if wrong := archive.testzip():
                raise ValueError(f"the checksum of {wrong} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: zip, pickle, EOF, runtime
        reason = str(error).split("\n")[0][:200]
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {reason}). It is cut off or not a "
            "checkpoint of numbers. Train that stage again, or copy the file again."
        ) from error


def load_state(model: nn.Module, state: dict[str, Tensor], source: object) -> None:
    """Copy a state dict into a model; every key must fit.

    Raises:
        UserError: missing, unexpected or wrong-shaped keys; the first of each are named.
    """
    check_state(model.state_dict(), state, source)
    model.load_state_dict(state)


def check_state(wanted: dict[str, Tensor], state: dict[str, Tensor], source: object) -> None:
    """UserError if a state dict differs in its names or shapes from the one that is wanted."""
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(state.keys() - wanted.keys())
    misshapen = [
        f"{name} is {tuple(state[name].shape)} in the file and {tuple(wanted[name].shape)} in the model"
        for name in wanted.keys() & state.keys()
        if wanted[name].shape != state[name].shape
    ]
    faults = [
        f"{len(names)} {what} (such as {names[0]})"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", sorted(misshapen)),
        )
        if names
    ]
    if faults:
        raise UserError(
            f"{source} does not fit the model: weights {'; '.join(faults)}. Give the config that "
            "it was trained with (hidden_size, num_hidden_layers, …)."
        )


def build(config: ModelConfig, state: dict[str, Tensor], source: object) -> MiniMind:
    """Return a model of this config with these weights, in eval mode.

    Either may come from a stranger: a config that asks for 10^12 parameters, a small file whose
    tensors claim to be huge. So the two are compared first on PyTorch's "meta" device, where a
    tensor is only its shape; memory is taken when all is known to fit.

    Raises:
        UserError: names, shapes or the tied embeddings do not fit.
    """
    check_tensors(state, source)
    if config.tie_word_embeddings and "model.embed_tokens.weight" in state:  # one copy is enough
        state = {"lm_head.weight": state["model.embed_tokens.weight"], **state}
    blocks = config.num_hidden_layers * (config.num_experts if config.use_moe else 1)
    if blocks > len(state):
        raise UserError(
            f"{source} does not fit the model: weights missing; the config asks for {blocks} blocks "
            f"and the file has {len(state)} tensors."
        )
    try:
        with torch.device("meta"):
            check_state(MiniMind(config).state_dict(), state, source)
    except (RuntimeError, OverflowError) as error:  # sizes beyond 2^63
        raise UserError(
            f"{source} does not fit the model: its config is absurd ({error})."
        ) from error
    head, embedding = state["lm_head.weight"], state["model.embed_tokens.weight"]
    if config.tie_word_embeddings and not torch.equal(head, embedding):
        raise UserError(f"{source}: the embeddings are tied in the config and differ in the file.")
    model = MiniMind(config)
    model.load_state_dict(state)
    return model.eval()


def check_tensors(state: object, source: object) -> None:
    """UserError unless `state` holds named, dense numbers, all of them really stored.

    Views of one storage would let a small file make a large model; only tied embeddings may share.
    """
    for name, tensor in state.items() if isinstance(state, dict) else [("it", state)]:
        plain = isinstance(name, str) and isinstance(tensor, Tensor) and tensor.is_floating_point()
        if not plain or tensor.layout != torch.strided:
            raise UserError(f"{source} is no weight: {name!r} is not a tensor of numbers.")
    claimed = sum(tensor.nbytes for name, tensor in state.items() if name != "lm_head.weight")
    storages = [tensor.untyped_storage() for tensor in state.values()]
    stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if claimed > stored:
        raise UserError(
            f"{source} stores less than its tensors claim: {stored:,} bytes for {claimed:,}. Do not use it."
        )


def load_sidecar(path: Path) -> dict:
    """Return the json beside a weight. UserError if it is missing or damaged."""
    file = path.with_suffix(".json")
    try:
        sidecar = json.loads(file.read_text(encoding="utf-8"))
        if not _is_sidecar(sidecar):
            raise ValueError("its config, tokenizer, stages or lora is missing or of another kind")
        return sidecar
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} needs its config and tokenizer in {file}, which cannot be read ({error}). "
            "Copy both files together."
        ) from error


def _is_object(found: object, **kinds: type) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(k), kinds[k]) for k in kinds)


def _is_sidecar(found: object) -> bool:
    if not _is_object(found, config=dict, tokenizer=dict, stages=list):
        return False
    stages = [
        _is_object({"settings": {}, **stage}, stage=str, settings=dict) for stage in found["stages"]
    ]
    matrices = {"r": int, "alpha": int | float, "target_modules": list}
    lora = {**matrices, "base_weight": str, "base_sha256": str}
    return all(stages) and ("lora" not in found or _is_object(found["lora"], **lora))


def find_weight(weight: str, out_dir: str | Path = "out") -> Path:
    """Return the file of a weight given by name ("full_sft") or by path.

    Raises:
        UserError: there is none, or several sizes of it; what there is is listed.
    """
    if weight.endswith(".pth") and Path(weight).is_file():
        return Path(weight)
    found = [
        p
        for p in sorted(Path(out_dir).glob("*.pth"))
        if p.stem.rpartition("_")[0] == weight or p.stem == weight
    ]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(p) for p in found)
        raise UserError(f"There are several weights {weight!r}: {names}. Give the path of one.")
    there = ", ".join(p.stem for p in sorted(Path(out_dir).glob("*.pth"))) or "none"
    raise UserError(
        f"There is no weight {weight!r} in {out_dir}/ (there: {there}). {how_to_make(weight, out_dir)}"
    )


def starting_weight(config: TrainConfig) -> Path:
    """Return the file of `from_weight`: a path, or a name in out_dir. UserError if there is none."""
    path = Path(config.from_weight)
    if path.suffix != ".pth":
        path = weight_path(config.out_dir, config.from_weight, config.hidden_size)
        if not path.is_file():
            raise UserError(
                f"There is no weight {path} to start from. {how_to_make(config.from_weight, config.out_dir)}"
            )
    return find_weight(str(path))


STAGE_OF_WEIGHT = {
    "pretrain": "pretrain", "full_sft": "sft", "lora": "lora", "dpo": "dpo", "reward": "reward", "reason": "reason",
    "grpo": "grpo", "spo": "spo", "full_dist": "distill",
}  # fmt: skip


def how_to_make(weight: str, out_dir: str | Path) -> str:
    """Return the sentence with the command that trains a weight."""
    stage = STAGE_OF_WEIGHT.get(weight)
    if stage is None:
        return f"Weights of the stages are called {', '.join(STAGE_OF_WEIGHT)}."
    folder = Path(out_dir)
    preset = f" --preset {folder.name}" if folder.name in ("course", "tiny") else ""
    place = "" if preset or folder == Path("out") else f" --out_dir {out_dir}"
    return f"Make it with: minimind {stage}{preset}{place}"


def load(weight: str, out_dir: str | Path = "out") -> tuple[MiniMind, Tokenizer]:
    """Return the model (in eval mode) and the tokenizer of a weight, by name or path.

    Raises:
        UserError: no such weight, a damaged file, or one that does not fit its config.
    """
    path = find_weight(str(weight), out_dir)
    model, sidecar = load_model(path)
    tokenizer = Tokenizer.from_json(json.dumps(sidecar["tokenizer"]))
    return model.eval(), fitting(tokenizer, model.config, path.with_suffix(".json"))


def fitting(tokenizer: Tokenizer, config: ModelConfig, source: object) -> Tokenizer:
    """Return the tokenizer. UserError if it has an id beyond those of the model."""
    ids = max(tokenizer.vocabulary.values()) + 1
    if ids > config.vocab_size:
        raise UserError(
            f"{source} has ids for {ids} tokens and the model {config.vocab_size}: it is the "
            "tokenizer of another model. Give the one that it was trained with."
        )
    return tokenizer


def load_model(path: Path, adapters: tuple[Path, ...] = ()) -> tuple[MiniMind, dict]:
    """Return the model of a weight file and its sidecar; an adapter comes merged into its base.

    Args:
        adapters: what this weight is the base of, so that none is its own.
    """
    sidecar = load_sidecar(path)
    if "lora" in sidecar:
        return load_adapted(path, sidecar["lora"], adapters), sidecar
    state = read_tensors(path)
    check_tensors(state, path)
    score = state.pop("score.weight", None)  # what makes a reward model of it
    model = build(ModelConfig.from_dict(sidecar["config"], path), state, path)
    if score is not None:
        model.score = nn.Linear(model.config.hidden_size, 1, bias=False)
        load_state(model.score, {"weight": score}, f"score.weight of {path}")
    return model, sidecar


def load_adapted(path: Path, lora: dict, adapters: tuple[Path, ...]) -> MiniMind:
    """Return the base that an adapter names, with the adapter merged into it.

    Raises:
        UserError: the base is missing or is not the one that the adapter was trained on; or the
            matrices have another rank than the adapter says.
    """
    base, state = path.parent / lora["base_weight"], read_tensors(path)
    check_tensors(state, path)
    if path.resolve() in adapters:
        raise UserError(f"{path} is an adapter to itself. Copy the weight and its .json again.")
    if not state or any(lora["r"] not in tensor.shape for tensor in state.values()):
        raise UserError(
            f"{path} does not fit this model: r={lora['r']} is not the rank of its matrices."
        )
    if not base.is_file():
        raise UserError(
            f"{path} is an adapter; its base weight {base} is missing. "
            f"{how_to_make(base.stem.rpartition('_')[0], base.parent)}"
        )
    if fingerprint(base) != lora["base_sha256"]:
        raise UserError(
            f"{path} was trained on another {base} than the one that is there now. Train the "
            f"adapter again. {how_to_make(path.stem.rpartition('_')[0], path.parent)}"
        )
    model, _ = load_model(base, (*adapters, path.resolve()))
    add_lora(model, lora["r"], lora["alpha"], lora["target_modules"])
    load_lora(model, state, path)
    return merge_lora(model)


def fingerprint(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    return digest_of(path).hexdigest()


def digest_of(path: str | Path, size: float = math.inf) -> hashlib._Hash:
    """Return the SHA-256 of a file's first `size` bytes, read in pieces; it can be added to."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(int(min(size, 2**20))):
            digest.update(piece)
            size -= len(piece)
    return digest
