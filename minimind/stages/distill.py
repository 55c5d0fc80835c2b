"""Knowledge distillation: a small student learns the whole distribution of a larger teacher.

Rows, template and mask are those of SFT. Beside the one token that stands in the text, the student
is shown what the teacher would have said there, all V probabilities of it (Hinton, Vinyals and
Dean, arXiv 1503.02531).

The teacher is a trained weight of the same vocabulary. If it is absent, `missing_teacher` names the
stages that make it, and `train` runs them first.

Left out: answers written by the teacher (training on its samples), matching hidden states, and
teachers of another vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind import losses
from minimind.checkpoint import (
    STAGE_OF_WEIGHT,
    how_to_make,
    load,
    load_sidecar,
    load_state,
    weight_path,
)
from minimind.config import DistillConfig, TrainConfig, stage_config
from minimind.data import Batch
from minimind.errors import UserError
from minimind.losses import in_chunks, is_small, labelled_places
from minimind.model import MiniMind
from minimind.stages.sft import sft_task
from minimind.stages.task import Metrics, Task
from minimind.tokenizer import Tokenizer

TEACHERS = ("pretrain", "full_sft")  # the weights that are made when they are absent


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float,
    temperature: float,
    places: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """alpha·CE + (1 - alpha)·T²·KL(teacher ‖ student), both softened by T, over labelled tokens.

    arXiv 1503.02531, section 2: the gradient of the softened term shrinks with 1/T², so T² keeps
    the balance of the two terms whatever the temperature.

    Args:
        student_logits, teacher_logits: (B, T, V); no gradient flows into the teacher's.
        labels: (B, T), aligned with the input ids; the shift by one happens here, -100 is ignored.
        places: `labelled_places(labels)`, if it is known.

    Returns:
        The loss, a scalar in nats (0 with a gradient if no label is left), and its detached parts
        "cross_entropy" (at temperature 1) and "kl" (at T, without T²).

    Raises:
        UserError: the two speak of different vocabularies or positions.
    """
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"The student's logits are {tuple(student_logits.shape)} and the teacher's "
            f"{tuple(teacher_logits.shape)}. Both must have one vocabulary and read the same tokens."
        )
    places = labelled_places(labels) if places is None else places
    student, teacher = (  # (N, V): only what is trained
        logits[:, :-1].flatten(0, 1)[places] for logits in (student_logits, teacher_logits)
    )
    sums = lesson(student, teacher.detach(), labels[:, 1:].flatten()[places], temperature)
    return blend(sums, len(places), alpha, temperature)


def lesson(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return Σ cross-entropy, and Σ KL(teacher ‖ student) at `temperature`, over N positions: (2,).

    Args:
        student, teacher: (N, V) logits.
        targets: (N,) the tokens that follow in the text.
    """
    student, teacher = student.float(), teacher.float()
    cross_entropy = F.cross_entropy(student, targets, reduction="sum")
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)  # Σ p·(log p - log q)
    return torch.stack([cross_entropy, kl])


def blend(sums: Tensor, count: int, alpha: float, temperature: float) -> tuple[Tensor, Metrics]:
    """Return the loss and its parts from the sums of `lesson` over `count` positions."""
    cross_entropy, kl = sums / max(1, count)
    loss = alpha * cross_entropy + (1 - alpha) * temperature**2 * kl
    return loss, {"cross_entropy": cross_entropy.detach(), "kl": kl.detach()}


def chunked_loss(
    student: nn.Module, teacher: nn.Module, batch: Batch, alpha: float, temperature: float
) -> tuple[Tensor, Metrics]:
    """Return `distillation_loss` of a batch; of both models' logits at most ONE_CHUNK are there at once."""
    ids, labels = batch["input_ids"], batch["labels"]
    places = batch["places"] if "places" in batch else labelled_places(labels)
    if is_small(labels, teacher.config.vocab_size):
        return distillation_loss(student(ids), teacher(ids), labels, alpha, temperature, places)
    taught = teacher.model(ids)

    def read(hidden: Tensor, head: nn.Linear) -> Tensor:
        def work(mine: Tensor, theirs: Tensor, targets: Tensor) -> Tensor:
            return lesson(head(mine), teacher.lm_head(theirs), targets, temperature)

        mine, theirs = (states[:, :-1].flatten(0, 1)[places] for states in (hidden, taught))
        rows = losses.ONE_CHUNK // (2 * head.out_features)
        return sum(in_chunks(work, rows, mine, theirs, labels[:, 1:].flatten()[places]))

    return blend(student(ids, read=read), len(places), alpha, temperature)


def teacher_path(config: DistillConfig) -> Path:
    """Return where the teacher's weight is, or will be once it has been trained.

    UserError if that is the file which the student will be saved to.
    """
    weight = config.teacher_weight
    named = weight_path(config.out_dir, weight, config.teacher_hidden_size)
    path = Path(weight) if weight.endswith(".pth") else named
    student = weight_path(config.out_dir, config.save_weight, config.student_hidden_size)
    if path.resolve() == student.resolve():
        raise UserError(
            f"Teacher and student are the same file {path}: the student would overwrite its teacher. "
            "Give the student another save_weight."
        )
    return path


def needs_teacher(config: DistillConfig) -> bool:
    """Whether the run looks at a teacher at all."""
    return config.alpha < 1 or bool(config.student_from_teacher)


def missing_teacher(config: DistillConfig) -> list[tuple[str, TrainConfig]]:
    """Return the runs (stage, settings) that make the teacher, in order; none if it is there.

    They are `teacher_preset`'s, at the teacher's width and depth, in the student's folder.
    UserError if there is no such weight and it is not one of `TEACHERS`.
    """
    if not needs_teacher(config) or teacher_path(config).is_file():
        return []
    shared = ("out_dir", "tokenizer_path", "dtype", "device", "seed", "from_resume", "num_attention_heads",
              "num_key_value_heads", "rope_theta", "qk_norm", "use_moe")  # fmt: skip
    settings = {name: getattr(config, name) for name in shared}
    width, depth = config.teacher_hidden_size, config.teacher_num_layers
    settings |= {"hidden_size": width, "num_hidden_layers": depth}
    runs, weight = [], config.teacher_weight
    while weight != "none" and not weight_path(config.out_dir, weight, width).is_file():
        if weight not in TEACHERS:
            raise UserError(
                f"There is no teacher {teacher_path(config)}, and only {' and '.join(TEACHERS)} are "
                f"trained on the way. {how_to_make(weight, config.out_dir)}"
            )
        stage = STAGE_OF_WEIGHT[weight]
        runs.insert(0, (stage, stage_config(stage, config.teacher_preset, **settings)))
        weight = runs[0][1].from_weight
    return runs


def teacher_tokenizer(config: DistillConfig) -> Tokenizer:
    """Return the tokenizer of the teacher: the student must have the same."""
    return Tokenizer.from_json(json.dumps(load_sidecar(teacher_path(config))["tokenizer"]))


def load_teacher(config: DistillConfig, tokenizer: Tokenizer, device: torch.device) -> MiniMind:
    """Return the teacher in eval mode, without gradients.

    Raises:
        UserError: another vocabulary or another shape than the settings say; the vocabulary is
            compared before any weight is read.
    """
    path = teacher_path(config)
    sidecar, vocabulary = load_sidecar(path), teacher_tokenizer(config).vocabulary
    if vocabulary != tokenizer.vocabulary:
        differ = len(vocabulary.items() ^ tokenizer.vocabulary.items())
        raise UserError(
            f"The teacher {path} has another vocabulary than the student: {len(vocabulary)} tokens "
            f"against {tokenizer.vocab_size}, {differ} entries differ. Their probabilities cannot be "
            "compared. Train one of them with the other's tokenizer_path."
        )
    shape = sidecar["config"]["hidden_size"], sidecar["config"]["num_hidden_layers"]
    if shape != (config.teacher_hidden_size, config.teacher_num_layers):
        raise UserError(
            f"The teacher {path} is {shape[0]} wide with {shape[1]} layers; the settings say "
            f"teacher_hidden_size={config.teacher_hidden_size}, "
            f"teacher_num_layers={config.teacher_num_layers}. Give the weight's own values."
        )
    return load(str(path))[0].to(device).requires_grad_(False)


def start_from_teacher(student: MiniMind, teacher: MiniMind) -> None:
    """Give the student the teacher's embeddings, last norm, and evenly spaced layers of it.

    The first and the last layer are among them: 3 of 4 are layers 0, 2 and 3. DistilBERT
    (arXiv 1910.01108, section 3) starts in the same way. UserError if the shapes do not fit.
    """
    few, many = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    if few > many:
        raise UserError(
            f"A student of {few} layers cannot start from a teacher of {many}. Lower "
            "student_num_layers, or give student_from_teacher=0."
        )
    state = {n: t for n, t in teacher.state_dict().items() if ".layers." not in n}
    for layer in range(few):
        taken = teacher.model.layers[round(layer * (many - 1) / max(1, few - 1))]
        state |= {f"model.layers.{layer}.{n}": t for n, t in taken.state_dict().items()}
    load_state(student, state, "The teacher")


def distill_task(config: DistillConfig, model: nn.Module, tokenizer: Tokenizer) -> Task:
    """SFT's rows and mask with the teacher's loss beside the text's.

    With alpha 1 the text teaches alone. Held-out rows are measured by cross-entropy in any case,
    so that runs with different alpha and temperature can be compared.
    """
    teacher = load_teacher(config, tokenizer, model.device) if needs_teacher(config) else None
    if config.student_from_teacher:
        start_from_teacher(model, teacher)
    task = sft_task(config, model, tokenizer)
    plain = task.loss

    def loss(student: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        if config.alpha == 1 or not student.training:
            return plain(student, batch)
        found, parts = chunked_loss(student, teacher, batch, config.alpha, config.temperature)
        return found + student.router_loss, parts

    task.loss = loss
    return task
