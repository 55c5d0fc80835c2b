"""Ways in and out: the model as a citizen of the ecosystem, the same numbers everywhere.

- out: `export_hf` writes a folder that transformers (and vLLM, lm-evaluation-harness) loads with no
  code of ours. Dense weights are Llama, with `qk_norm` Qwen3, with experts Qwen3-MoE.
- in: `load` takes a weight of ours, such a folder, or a `.pth` of upstream MiniMind.

A conversion is exact, or it is refused with the reason. What comes in may come from anybody:
nothing in it is run (no pickle, no remote code, no template of theirs), and no memory is taken
before every shape is known to fit the file. Left out: sharded, quantised and `.bin` weights.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from minimind import checkpoint
from minimind.checkpoint import (
    build,
    check_tensors,
    find_weight,
    fitting,
    load_sidecar,
    read_tensors,
    write_atomically,
)
from minimind.config import YARN, ModelConfig
from minimind.errors import UserError, needed
from minimind.model import MiniMind
from minimind.tokenizer import BOS, EOS, PAD, Tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FAMILIES = {
    "llama": ("LlamaForCausalLM", {"qk_norm": False, "use_moe": False}),
    "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True, "use_moe": False}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"qk_norm": True, "use_moe": True}),
}
_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
          "intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
_MOE = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
        "router_aux_loss_coef")  # fmt: skip
# Settings of a foreign config that change the computation, with the only values that are ours.
_FIXED = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,),
          "decoder_sparse_step": (1,), "mlp_only_layers": ([],), "partial_rotary_factor": (1, 1.0),
          "pretraining_tp": (1,), "quantization_config": (), "layer_types": ()}  # fmt: skip


def family(config: ModelConfig) -> str:
    """Return Hugging Face's model_type of a config.

    Raises:
        UserError: experts without qk_norm; no architecture computes exactly that.
    """
    for name, (_, flags) in FAMILIES.items():
        if all(getattr(config, flag) == value for flag, value in flags.items()):
            return name
    raise UserError(
        "A mixture of experts without qk_norm has no exact counterpart: Qwen3-MoE norms queries and "
        "keys. Train it with --use_moe 1 --qk_norm to export it."
    )


def hf_config(config: ModelConfig) -> dict:
    """Return the content of config.json.

    theta stands twice: transformers 5 reads `rope_parameters`, everything older `rope_theta` (and
    `rope_scaling`). Left out, it would silently be 10,000.
    """
    model_type = family(config)
    names = _SHAPE + (_MOE if config.use_moe else ())
    scaling = config.rope_scaling
    rope = {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta}
    return {
        "architectures": [FAMILIES[model_type][0]],
        "model_type": model_type,
        **{name: getattr(config, name) for name in names},
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        **({"rope_scaling": scaling} if scaling else {}),
        "hidden_act": "silu",
        "attention_bias": False,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def config_from_hf(values: dict, source: object) -> ModelConfig:
    """Return our config of a config.json. UserError for anything that we would compute differently."""
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"{source}: model_type={model_type!r} is none of {', '.join(FAMILIES)}.")
    if set(values.get("layer_types") or ()) == {"full_attention"}:
        values = {**values, "layer_types": None}
    for name, ours in _FIXED.items():
        found = values.get(name)
        if found is not None and found not in ours:
            raise UserError(
                f"{source}: {name}={found!r} is not something this model computes "
                f"(only {' or '.join(map(repr, ours)) or 'none'}), so it would not be the same model."
            )
    values = {"num_experts": values.get("num_local_experts"), **values}  # transformers 5's word
    names = _SHAPE + (_MOE if model_type == "qwen3_moe" else ())
    optional = ("head_dim", "router_aux_loss_coef")
    missing = [name for name in names if values.get(name) is None and name not in optional]
    if missing:
        raise UserError(f"{source} says nothing about {', '.join(missing)}. Copy the file again.")
    shape = {name: values[name] for name in names if values.get(name) is not None}
    shape = {**shape, **_rope_from_hf(values, source), **FAMILIES[model_type][1]}
    return ModelConfig.from_dict(shape, source)


def _rope_from_hf(values: dict, source: object) -> dict:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{source}: rope_parameters={rope!r} is not an object.")
    theta = rope.get("rope_theta", values.get("rope_theta", 10_000.0))  # transformers' default
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "yarn" or rope.get("truncate") is False or rope.get("mscale"):
        raise UserError(f"{source}: of the RoPE scalings, only plain YaRN is computed here: {rope}")
    scaling = {name: value for name, value in rope.items() if name in YARN and value is not None}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": "yarn", **scaling}}


def export_hf(
    weight: str | Path, folder: str | Path, out_dir: str | Path = "out", tokenizer_path: str = ""
) -> Path:
    """Write a weight (anything that `load` takes) as a folder that transformers loads.

    `AutoModelForCausalLM.from_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder)` then
    give the same logits and the same ids, with no remote code.

    Raises:
        UserError: a weight that cannot be read, or that has no exact counterpart.
    """
    return write_hf(*load(weight, out_dir, tokenizer_path), folder)


def write_hf(model: MiniMind, tokenizer: Tokenizer, folder: str | Path) -> Path:
    """Write config.json, model.safetensors, the tokenizer and its chat template into a folder."""
    safetensors = needed("safetensors.torch", "hf")
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_id") for n in ("pad", "bos", "eos")}
    values, state = {**hf_config(model.config), **ids}, export_state(model)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        **special,
        "chat_template": CHAT_TEMPLATE,
    }
    texts = {
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=1, ensure_ascii=False),
        "special_tokens_map.json": json.dumps(special, indent=1),
        "chat_template.jinja": CHAT_TEMPLATE,
        "generation_config.json": json.dumps(ids, indent=1),
        "config.json": json.dumps(values, indent=1),
    }
    content = safetensors.save(state, metadata={"format": "pt"})
    write_atomically(Path(folder) / "model.safetensors", lambda file: file.write(content))
    for name, text in texts.items():
        write_atomically(Path(folder) / name, lambda file, text=text: file.write(text.encode()))
    return Path(folder)


def export_state(model: MiniMind) -> dict[str, Tensor]:
    """Return the weights under Hugging Face's names: ours, without the copy of tied embeddings.

    Raises:
        UserError: the model carries more than its config says (adapters that are not merged).
    """
    with torch.device("meta"):
        plain = MiniMind(model.config).state_dict()
    state = model.state_dict()
    if more := sorted(state.keys() - plain.keys()):
        raise UserError(f"The model has more weights than its own ({more[0]}). Merge them first.")
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}


def import_hf(folder: str | Path) -> tuple[MiniMind, Tokenizer]:
    """Read a folder in Hugging Face's format: config.json, model.safetensors, tokenizer.json.

    No other file of the folder is opened, so neither its code nor its template is ever run.

    Raises:
        UserError: a file is missing or damaged, or the model is not exactly one of ours.
    """
    folder = Path(folder)
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config_from_hf(dict(values), folder / "config.json")
    except UserError:
        raise
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}/config.json cannot be read ({error}). Copy it again.") from error
    model = build(config, read_safetensors(folder / "model.safetensors"), folder)
    return model, fitting(Tokenizer.load(folder / "tokenizer.json"), config, folder)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file. UserError if it is missing, sharded or damaged."""
    safetensors = needed("safetensors.torch", "hf")
    if not path.is_file():
        raise UserError(
            f"There is no {path}. One file is read, not shards (model.safetensors.index.json) and no "
            ".bin; write it again with save_pretrained(folder, max_shard_size='100GB')."
        )
    try:
        return safetensors.load_file(path)
    except Exception as error:  # the library's own error, OSError, MemoryError
        raise UserError(f"{path} cannot be read ({error}). Copy the file again.") from error


def upstream_config(state: dict[str, Tensor], source: object) -> ModelConfig:
    """Infer the config of an upstream MiniMind weight from the shapes in it.

    Two generations: the guide's (late 2025; Llama: 8 heads, eps 1e-5, two experts per token) and
    today's (Qwen3: q/k norm, eps 1e-6, one expert per token); theta is 1e6 in both. What shapes
    do not tell (theta, eps, experts per token, and 8 heads without q_norm) is that version's default.

    Raises:
        UserError: another kind of file, which is named.
    """
    _refuse_other_kinds(state, source)
    layer = "model.layers.0."
    try:
        q, k = (state[f"{layer}self_attn.{name}_proj.weight"].shape[0] for name in "qk")
        vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
        today = f"{layer}self_attn.q_norm.weight" in state
        head_dim = state[f"{layer}self_attn.q_norm.weight"].shape[0] if today else q // 8
        moe = f"{layer}mlp.gate.weight" in state
        width = state[f"{layer}mlp.{'experts.0.' if moe else ''}gate_proj.weight"].shape[0]
        heads, kv_heads = q // head_dim, k // head_dim
        experts = {"num_experts": state[f"{layer}mlp.gate.weight"].shape[0]} if moe else {}
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{source} is no MiniMind weight: {error} is missing or odd.") from error
    head = state.get("lm_head.weight")
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, head_dim=head_dim, intermediate_size=width,
        num_hidden_layers=len({name.split(".")[2] for name in state if name.startswith("model.layers.")}),
        num_attention_heads=heads, num_key_value_heads=kv_heads, rms_norm_eps=1e-6 if today else 1e-5,
        tie_word_embeddings=head is None or torch.equal(head, state["model.embed_tokens.weight"]),
        qk_norm=today, use_moe=moe, num_experts_per_tok=1 if today else 2, **experts,
    )  # fmt: skip


_OTHER_KINDS = (
    ("tok_embeddings.weight", "is from before May 2025, whose rotary pairs are interleaved. Use a newer release"),
    ("shared_expert", "has a shared expert beside the routed ones, which neither this model nor Qwen3-MoE has"),
    ("optimizer", "is a resume point. Take the weight that the same run saved in out/"),
    ("lora", "holds adapters only. Merge them into their base model first"),
)  # fmt: skip


def _refuse_other_kinds(state: object, source: object) -> None:
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{source} is not a state dict. Give the .pth that a MiniMind stage saved.")
    for mark, reason in _OTHER_KINDS:
        if any(mark in name for name in state):
            raise UserError(f"{source} {reason}.")
    check_tensors(state, source)


def load_upstream(path: str | Path, tokenizer_path: str | Path = "") -> tuple[MiniMind, Tokenizer]:
    """Load a `.pth` of upstream MiniMind; the config is inferred and printed.

    The tokenizer is `tokenizer_path`, or a tokenizer.json beside the weight, or in `../model/`,
    where upstream keeps it.

    Raises:
        UserError: another kind of file; no tokenizer; float32 numbers, which upstream never saves.
    """
    path = Path(path)
    state = read_tensors(path)
    config = upstream_config(state, path)
    if state["model.embed_tokens.weight"].dtype == torch.float32:
        raise UserError(
            f"{path} holds float32 numbers. Upstream saves half precision, so this is a weight of this "
            f"course that has lost its {path.with_suffix('.json').name}, without which its config would "
            "be a guess. Copy both files together."
        )
    tables = [name for name in state if "freqs_" in name]  # RoPE's, which some releases saved
    model = build(config, {name: state[name] for name in state.keys() - tables}, path)
    places = [path.parent / "tokenizer.json", path.parent.parent / "model" / "tokenizer.json"]
    there = [Path(tokenizer_path)] if tokenizer_path else [p for p in places if p.is_file()]
    if not there:
        raise UserError(
            f"{path} needs its tokenizer: {places[0]}, {places[1]} or --tokenizer_path."
        )
    version = "today's version" if config.qk_norm else "the guide's version"
    told = {name: value for name, value in config.to_dict().items() if value is not None}
    print(f"{path} has no .json beside it: read as upstream MiniMind of {version}, {told}")
    return model, fitting(Tokenizer.load(there[0]), config, there[0])


def load(
    weight: str | Path, out_dir: str | Path = "out", tokenizer_path: str = ""
) -> tuple[MiniMind, Tokenizer]:
    """Return the model (in eval mode) and the tokenizer of a weight from anywhere.

    Args:
        weight: the name of a weight in out_dir ("full_sft"), the path of its .pth, a folder in
            Hugging Face's format, or a .pth of upstream MiniMind (one without a .json beside it).
        tokenizer_path: the tokenizer of an upstream weight, if it is not beside it.

    Raises:
        UserError: no such weight, a damaged file, or one that is not exactly a model of ours.
    """
    path = locate(weight, out_dir)
    if path.is_dir():
        return import_hf(path)
    return load_upstream(path, tokenizer_path) if is_upstream(path) else checkpoint.load(str(path))


def locate(weight: str | Path, out_dir: str | Path = "out") -> Path:
    """Return the folder or the .pth that `load` reads. UserError if there is none."""
    name = str(weight)
    if (Path(name) / "config.json").is_file() or (Path(name).is_dir() and "/" in name):
        return Path(name)
    if name.endswith(".gguf"):
        raise UserError(f"A GGUF is run by llama.cpp. Talk to it: minimind chat --weight {name}")
    return find_weight(name, out_dir)


def is_upstream(path: Path) -> bool:
    """Return whether a file is taken for a weight of upstream MiniMind: it has no .json beside it."""
    return path.is_file() and not path.with_suffix(".json").is_file()


def trained_length(weight: str | Path, out_dir: str | Path = "out") -> int:
    """Return the longest row, in tokens, that a weight of ours was trained on; 0 if unknown."""
    try:
        stages = load_sidecar(find_weight(str(weight), out_dir))["stages"]
    except UserError:
        return 0
    lengths = [stage.get("settings", {}).get("max_seq_len", 0) for stage in stages]
    return max(lengths, default=0)


def stretch(model: MiniMind, factor: float, trained: int, **more: float) -> MiniMind:
    """Return the model with YaRN (arXiv 2309.00071): for texts `factor` times as long as trained on.

    The weights stay as they are; only the rotary frequencies change. `more` may name YaRN's other
    settings: upstream's attention_factor is 1.0 and not the paper's 0.1 ln(factor) + 1.
    """
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": trained,
        **more,
    }
    longest = {"max_position_embeddings": int(factor * trained)}
    config = dataclasses.replace(model.config, rope_scaling=scaling, **longest)
    return build(config, model.state_dict(), "the model")
