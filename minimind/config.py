"""What can be set: the shape of the model, the settings of every stage, and the three presets.

- `tiny` finishes a stage in seconds and proves that the code runs (tests).
- `course` gives the notebooks their results on a 2-core CPU in minutes.
- `full` is the guide's table: a 26M model, real corpora, a GPU. It is the dataclass defaults.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

from minimind.errors import UserError, bad_value
from minimind.presets import PRESETS


def round_up(value: float, multiple: int = 64) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return int(-(-value // multiple) * multiple)


@dataclass
class ModelConfig:
    """Shape of a decoder-only transformer, in the words of Hugging Face's configs.

    The default is MiniMind's 25,829,888-parameter model and equals `LlamaForCausalLM`; with
    `qk_norm` it equals `Qwen3ForCausalLM`, with `qk_norm` and `use_moe` `Qwen3MoeForCausalLM`.

    Attributes:
        head_dim: size of one head; default `hidden_size // num_attention_heads`.
        intermediate_size: width of the feed-forward; default 8/3 of hidden, rounded up to 64.
        rope_scaling: `{"rope_type": "yarn", "factor": 4.0,
            "original_max_position_embeddings": 2048}` stretches RoPE to longer texts
            (YaRN, arXiv 2309.00071); None leaves it as trained. Also `attention_factor` (default
            0.1 ln(factor) + 1), `beta_fast` and `beta_slow`.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts.
    """

    vocab_size: int = 6400
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-5
    dropout: float = 0.0
    tie_word_embeddings: bool = True
    qk_norm: bool = False
    use_moe: bool = False
    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.01

    def __post_init__(self) -> None:
        if self.head_dim is None:
            self._must_divide("hidden_size", "num_attention_heads")
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._must_divide("num_attention_heads", "num_key_value_heads")
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd; RoPE turns pairs. Make it even.")
        self.intermediate_size = self.intermediate_size or round_up(8 / 3 * self.hidden_size)
        self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
        if self.use_moe and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(
                f"num_experts_per_tok={self.num_experts_per_tok} must be between 1 and "
                f"num_experts={self.num_experts}."
            )
        self._check_scaling(self.rope_scaling)

    def _check_scaling(self, scaling: dict | None) -> None:
        numbers = {k: v for k, v in (scaling or {}).items() if k != "rope_type"}
        good = all(_is_number(value) and value > 0 for value in numbers.values())
        if scaling and not (
            scaling.get("rope_type") == "yarn" and good and numbers.keys() <= YARN
            and numbers.get("factor", 0) >= 1 and "original_max_position_embeddings" in numbers
        ):  # fmt: skip
            raise UserError(
                f"rope_scaling={scaling} is not understood: rope_type 'yarn', factor (at least 1) and "
                f"original_max_position_embeddings; beside them only {', '.join(sorted(YARN))}."
            )

    def _must_divide(self, whole: str, part: str) -> None:
        a, b = getattr(self, whole), getattr(self, part)
        if b < 1 or a % b:
            raise UserError(f"{whole}={a} is not a multiple of {part}={b}. Change one of the two.")

    @classmethod
    def from_dict(cls, values: dict, source: object = "the config") -> ModelConfig:
        """Build a config from a file's dict; an unknown key is an error with near misses."""
        kinds = {field.name: field.type.split(" | ") for field in fields(cls)}
        for key, value in values.items():
            if key not in kinds:
                raise bad_value("model setting", key, kinds)
            kind, *optional = kinds[key]
            if not _IS_A[kind](value) and not (value is None and optional):
                raise UserError(f"{source}: {key}={value!r} is not {_WANTED[kind]}.")
        return cls(**values)

    def to_dict(self) -> dict:
        """Return the settings as a dict that JSON can hold."""
        return asdict(self)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


_IS_A = {
    "int": lambda value: _is_number(value) and isinstance(value, int) and 1 <= value < 2**31,
    "float": _is_number,
    "bool": lambda value: isinstance(value, bool),
    "dict": lambda value: isinstance(value, dict),
}
_WANTED = {
    "int": "a whole number from 1 to 2^31",
    "float": "a number",
    "bool": "true or false",
    "dict": "an object",
}
YARN = {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}


@dataclass
class TrainConfig:
    """Settings that every stage shares: the guide's flags, under the guide's names.

    Attributes:
        epochs: passes over the data; may be a fraction.
        batch_size: rows (or packed blocks) in one forward pass of one process.
        accumulation_steps: forward passes per optimizer step, of each process.
        learning_rate: peak; it falls along a cosine to a tenth of it.
        optimizer: "adamw", or "muon" for the matrices of the blocks and AdamW for the rest.
        warmup_steps: steps of linear warm-up before the cosine.
        max_seq_len: longest row in tokens; longer ones are cut.
        grad_clip: largest norm of the gradient; 0 leaves it alone.
        dtype: float32, bfloat16 or float16 autocast; "auto" takes bfloat16 where the hardware
            has it. Weights and optimizer are float32 in every case.
        device: "auto" takes a CUDA GPU if there is one, else the CPU.
        compile: 1 compiles the blocks, which takes a minute (the time is printed) and makes every
            step faster; on a GPU also the sampling of RL. Needs a C++ compiler.
        gradient_checkpointing: 1 computes every block a second time in the backward pass instead
            of keeping what it computed: less memory, more time, the same gradients.
        from_weight: the weight to start from, a name in out_dir or a path; "none": from nothing.
        save_weight: the name under which the trained weight is saved.
        tokenizer_path: for a run that starts from nothing; with from_weight that weight's own is used.
            Empty: pretraining trains one of 6,400 tokens on data_path and keeps it beside it,
            distillation takes the teacher's.
        from_resume: 1 continues from this stage's newest whole resume point if there is one.
        skip_bad_steps: 1 leaves out a step whose loss or gradient is not finite, or whose loss
            explodes, and counts it; 0 stops with a diagnosis.
        save_interval: steps between two resume points.
        log_interval: steps between two rows of the log.
        eval_interval: steps between two measurements of the held-out loss; 0: none.
        eval_data_path: held-out rows in the format of data_path.
        skip_bad_rows: 1 leaves out rows that cannot be used, names and counts them; 0 stops at the first.
        fsdp: 1 cuts weights, gradients and optimizer states into shares, one for each process
            (FSDP2); for a model that is too large for one GPU.
        out_dir: folder of the weights. Resume points go to `checkpoints` if it is `out`, else
            to `<out_dir>/checkpoints`.
        tracker: "wandb", "tensorboard" or "trackio" gets every row of the log; "none": the file
            `<out_dir>/<weight>_<hidden>.log.jsonl` and the live curve alone, which are always there.
        use_wandb: 1 is tracker="wandb", in the guide's words.
        wandb_project: the project under which wandb and trackio file the run.
    """

    data_path: str = ""
    eval_data_path: str = ""
    skip_bad_rows: int = 0
    tokenizer_path: str = ""
    out_dir: str = "out"
    from_weight: str = "none"
    save_weight: str = ""
    epochs: float = 1
    batch_size: int = 32
    accumulation_steps: int = 1
    learning_rate: float = 5e-4
    optimizer: str = "adamw"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    adam_beta2: float = 0.999
    grad_clip: float = 1.0
    max_seq_len: int = 340
    dtype: str = "bfloat16"
    device: str = "auto"
    compile: int = 0
    gradient_checkpointing: int = 0
    fsdp: int = 0
    seed: int = 42
    from_resume: int = 0
    skip_bad_steps: int = 0
    save_interval: int = 100
    log_interval: int = 10
    eval_interval: int = 0
    tracker: str = "none"
    use_wandb: bool = False
    wandb_project: str = "MiniMind"
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    rope_theta: float = 1e6
    qk_norm: bool = False
    use_moe: int = 0

    def __post_init__(self) -> None:
        above_0(self, "epochs", "batch_size", "accumulation_steps", "learning_rate", "log_interval",
                "save_interval", "hidden_size", "num_hidden_layers")  # fmt: skip
        at_least(self, 0, "seed")
        if self.max_seq_len < 2:
            raise UserError(
                f"max_seq_len={self.max_seq_len} must be at least 2: a token predicts the next."
            )
        if self.dtype not in DTYPES:
            raise bad_value("dtype", self.dtype, DTYPES)
        if self.optimizer not in OPTIMIZERS:
            raise bad_value("optimizer", self.optimizer, OPTIMIZERS)
        if self.tracker not in TRACKERS:
            raise bad_value("tracker", self.tracker, TRACKERS)
        if self.use_wandb and self.tracker not in ("none", "wandb"):
            raise UserError(f"use_wandb=1 and tracker={self.tracker!r} are two trackers. Give one.")
        if self.use_wandb:
            self.tracker = "wandb"

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of the resume points."""
        out = Path(self.out_dir)
        return Path("checkpoints") if out == Path("out") else out / "checkpoints"


DTYPES = ("auto", "float32", "bfloat16", "float16")
OPTIMIZERS = ("adamw", "muon")
TRACKERS = ("none", "wandb", "tensorboard", "trackio")
NORMALIZERS = ("tokens", "weights")
POLICY_LOSSES = ("clip", "cispo")
TOO_SMALL_A_GROUP = (
    "num_generations={}: an answer is compared with the others of its group. Sample at least 2 "
    "for each prompt, or use SPO, which needs 1."
)


def at_least(config: TrainConfig, low: float, *names: str) -> None:
    """UserError if one of the settings is below `low`, infinite or NaN."""
    for name in names:
        if not low <= getattr(config, name) < math.inf:
            raise UserError(f"{name}={getattr(config, name)} must be a number from {low} up.")


def above_0(config: TrainConfig, *names: str) -> None:
    """UserError if one of the settings is 0 or below, infinite or NaN."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"{name}={getattr(config, name)} must be above 0 and finite.")


@dataclass
class PretrainConfig(TrainConfig):
    """Pretraining: next-token prediction on plain text."""

    data_path: str = "dataset/pretrain_hq.jsonl"
    save_weight: str = "pretrain"
    accumulation_steps: int = 8


@dataclass
class SFTConfig(TrainConfig):
    """Supervised fine-tuning: loss on the assistant's tokens only."""

    data_path: str = "dataset/sft_mini_512.jsonl"
    from_weight: str = "pretrain"
    save_weight: str = "full_sft"
    epochs: float = 2
    batch_size: int = 16
    learning_rate: float = 5e-7


@dataclass
class LoRAConfig(TrainConfig):
    """Low-rank adapters on a frozen model, trained like SFT.

    Attributes:
        lora_r: rank of each update.
        lora_alpha: strength; the update is scaled by lora_alpha / lora_r.
        target_modules: projections that get one, among q_proj k_proj v_proj o_proj gate_proj
            up_proj down_proj.
    """

    data_path: str = "dataset/lora_identity.jsonl"
    from_weight: str = "full_sft"
    save_weight: str = "lora"
    epochs: float = 50
    learning_rate: float = 1e-4
    lora_r: int = 8
    lora_alpha: float = 16
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass
class DPOConfig(TrainConfig):
    """Direct preference optimisation.

    Attributes:
        batch_size: pairs, not answers.
        beta: how closely the model keeps to its reference, the weights it started from.
        sft_coef: adds so much of the SFT loss on the chosen answers (arXiv 2404.19733).
    """

    data_path: str = "dataset/dpo.jsonl"
    from_weight: str = "full_sft"
    save_weight: str = "dpo"
    batch_size: int = 4
    learning_rate: float = 4e-8
    max_seq_len: int = 1024
    beta: float = 0.1
    sft_coef: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise UserError(f"beta={self.beta} must be above 0; 0.1 is usual, 0.01 moves further.")
        if not self.sft_coef >= 0:
            raise UserError(f"sft_coef={self.sft_coef} must be 0 (DPO alone) or above.")


@dataclass
class RewardConfig(TrainConfig):
    """A reward model from preference pairs.

    Attributes:
        batch_size: pairs, not answers.
        centre: how strongly the scores of a pair are held around 0 (arXiv 2312.09244).
    """

    data_path: str = "dataset/dpo.jsonl"
    from_weight: str = "full_sft"
    save_weight: str = "reward"
    batch_size: int = 4
    learning_rate: float = 1e-6
    max_seq_len: int = 1024
    centre: float = 0.01


@dataclass
class ReasonConfig(TrainConfig):
    """Reasoning distillation: SFT with more weight on the four tags.

    Attributes:
        tag_weight: weight of each tag in the loss; every other token has 1.
        normalizer: what the weighted sum is divided by: "tokens" or "weights".
        chat_path: ordinary chat rows (without tags) that are mixed in, so that the model does not
            forget to chat; empty: none.
        chat_share: how many of them, per reasoning row.
    """

    data_path: str = "dataset/r1_mix_1024.jsonl"
    from_weight: str = "dpo"
    save_weight: str = "reason"
    batch_size: int = 8
    learning_rate: float = 1e-6
    max_seq_len: int = 720
    tag_weight: float = 10.0
    normalizer: str = "tokens"
    chat_path: str = ""
    chat_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tag_weight < float("inf"):
            raise UserError(
                f"tag_weight={self.tag_weight} must be a number above 0; 1 is plain SFT."
            )
        if self.normalizer not in NORMALIZERS:
            raise bad_value("normalizer", self.normalizer, NORMALIZERS)
        if not 0 <= self.chat_share < float("inf"):
            raise UserError(f"chat_share={self.chat_share} must be 0 (no chat rows) or above.")


@dataclass
class GRPOConfig(TrainConfig):
    """Group relative policy optimisation. `max_seq_len` limits the prompt.

    Attributes:
        max_new_tokens: an answer that has not ended by then is cut and counted as truncated.
        num_generations: answers sampled for each prompt.
        num_iterations: updates on the same answers; above 1 `clip_eps` limits how far they go.
        beta: weight of the distance (KL) to the weights that the run started from.
        policy_loss: "clip" as in PPO, or "cispo" (arXiv 2506.13585).
        reasoning: 1 rewards the form with tags too where a reward model judges, as the guide does.
        reward_model_path: what judges problems without an "answer": a Hugging Face folder or a
            weight of `minimind reward`; empty: the weight `reward` in out_dir.
        allow_remote_code: 1 runs the code that such a folder may bring. Read it before.
    """

    data_path: str = "dataset/rlaif-mini.jsonl"
    from_weight: str = "reason"
    save_weight: str = "grpo"
    batch_size: int = 2
    learning_rate: float = 8e-8
    max_seq_len: int = 66
    max_new_tokens: int = 1536
    num_generations: int = 8
    num_iterations: int = 1
    beta: float = 0.02
    clip_eps: float = 0.2
    policy_loss: str = "clip"
    reasoning: int = 1
    reward_model_path: str = ""
    allow_remote_code: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations < 2:
            raise UserError(TOO_SMALL_A_GROUP.format(self.num_generations))
        at_least(self, 1, "max_new_tokens", "num_iterations")
        at_least(self, 0, "beta")
        above_0(self, "clip_eps")
        if self.policy_loss not in POLICY_LOSSES:
            raise bad_value("policy_loss", self.policy_loss, POLICY_LOSSES)


@dataclass
class SPOConfig(TrainConfig):
    """Single-stream policy optimisation. `max_seq_len` limits the prompt.

    One step samples one answer to each of `batch_size` x `accumulation_steps` problems. They are
    drawn by how open their outcome is, so `epochs` counts how many, not passes over the data.

    Attributes:
        max_new_tokens: an answer that has not ended by then is cut and counted as truncated.
        beta: weight of the distance (KL) to the weights that the run started from.
        priority_epsilon: how often a problem is drawn whose outcome is certain; one whose outcome
            is open is drawn with up to 0.5 more. Far above 0.5 all are drawn alike.
        d_half: after a move of so many nats per token the tracker has forgotten half. For prompts
            that come back after many steps; problems whose "kind" comes in every step want the
            size of a step's KL, which is logged.
        reasoning: 1 rewards the form with tags too where a reward model judges, as the guide does.
        reward_model_path: what judges problems without an "answer": a Hugging Face folder or a
            weight of `minimind reward`; empty: the weight `reward` in out_dir.
        allow_remote_code: 1 runs the code that such a folder may bring. Read it before.
    """

    data_path: str = "dataset/rlaif-mini.jsonl"
    from_weight: str = "reason"
    save_weight: str = "spo"
    batch_size: int = 2
    accumulation_steps: int = 4
    learning_rate: float = 1e-7
    max_seq_len: int = 66
    max_new_tokens: int = 1536
    beta: float = 0.02
    priority_epsilon: float = 0.05
    d_half: float = 0.06
    reasoning: int = 1
    reward_model_path: str = ""
    allow_remote_code: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_new_tokens")
        at_least(self, 0, "beta")
        above_0(self, "priority_epsilon", "d_half")


@dataclass
class DistillConfig(TrainConfig):
    """Knowledge distillation: a small student learns the distribution of a larger teacher.

    The model that is trained is the student, so `hidden_size` and `num_hidden_layers` are read
    off it and are no settings here.

    Attributes:
        alpha: weight of the text's cross-entropy; 1 - alpha is the teacher's. 1: no teacher.
        temperature: softens both distributions of the teacher's term.
        teacher_weight: a weight's name in out_dir, or a path. An absent `pretrain` or `full_sft`
            is trained first, with the settings of `teacher_preset` and the teacher's shape.
    """

    data_path: str = "dataset/sft_mini_512.jsonl"
    save_weight: str = "full_dist"
    epochs: float = 6
    learning_rate: float = 5e-6
    hidden_size: ClassVar[property] = property(lambda self: self.student_hidden_size)
    num_hidden_layers: ClassVar[property] = property(lambda self: self.student_num_layers)
    alpha: float = 0.5
    temperature: float = 1.5
    teacher_weight: str = "full_sft"
    teacher_preset: str = "full"
    teacher_hidden_size: int = 768
    teacher_num_layers: int = 16
    student_hidden_size: int = 512
    student_num_layers: int = 8
    student_from_teacher: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UserError(
                f"alpha={self.alpha} must be from 0 (the teacher alone) to 1 (the text alone)."
            )
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be above 0 and finite.")
        if self.student_from_teacher and self.from_weight != "none":
            raise UserError(
                f"The student cannot start from its teacher and from from_weight={self.from_weight!r}. "
                "Give one of the two."
            )
        if self.teacher_preset not in PRESETS:
            raise bad_value("teacher_preset", self.teacher_preset, PRESETS)


CONFIGS: dict[str, type[TrainConfig]] = {
    "pretrain": PretrainConfig, "sft": SFTConfig, "lora": LoRAConfig, "dpo": DPOConfig, "reward": RewardConfig,
    "reason": ReasonConfig, "grpo": GRPOConfig, "spo": SPOConfig, "distill": DistillConfig,
}  # fmt: skip


def data_samples(name: str = "") -> Path:
    """Return the path of a file of the built-in data, wherever the course is installed."""
    return Path(__file__).resolve().parent.parent / "data_samples" / name


def stage_config(stage: str, preset: str = "full", **settings: object) -> TrainConfig:
    """Return the settings of a stage: the preset's, overridden by `settings`.

    Raises:
        UserError: unknown stage, preset or setting; near misses are listed.
    """
    if stage not in CONFIGS:
        raise bad_value("stage", stage, CONFIGS)
    if preset not in PRESETS:
        raise bad_value("preset", preset, PRESETS)
    known = [field.name for field in fields(CONFIGS[stage])]
    for name in settings:
        if name not in known:
            raise bad_value("setting", name, known, where=f"of the stage {stage!r}")
    return CONFIGS[stage](**{**preset_settings(stage, preset), **settings})


def preset_settings(stage: str, preset: str) -> dict:
    """Return what a preset changes; the small presets run on the built-in data."""
    if preset == "full":
        return {}
    stem = {"spo": "grpo", "reward": "dpo"}.get(stage, stage)  # they learn from the same rows
    data = {
        "data_path": str(data_samples(f"{stem}.jsonl")),
        "eval_data_path": str(data_samples(f"{stem}_heldout.jsonl")),
        "tokenizer_path": str(data_samples("tokenizer.json")),
    }
    if stage == "reason":
        data["chat_path"] = str(data_samples("sft.jsonl"))
    return {**data, **PRESETS[preset][stage]}
