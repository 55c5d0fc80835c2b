"""GGUF: the one-file format of llama.cpp, and so of Ollama and LM Studio.

The file is written with the `gguf` package, in float32: exact, and llama.cpp's own tools quantise
it further. Three things make or break it:

- Llama's Q and K rows are reordered, because llama.cpp turns the pairs (2i, 2i+1) for that
  architecture and (i, i + D/2) for Qwen3, as we do.
- `tokenizer.ggml.pre` names the pre-tokenizer; ours (digits one by one, then GPT-2's pattern) is
  the one that llama.cpp calls "smollm".
- The tags are user-defined tokens (found in any text), the template's three are control tokens
  (found only where the server parses special tokens, as it does for a whole chat).
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimind.checkpoint import write_atomically
from minimind.config import ModelConfig
from minimind.errors import UserError, needed
from minimind.interop import CHAT_TEMPLATE, export_state, family
from minimind.model import MiniMind
from minimind.tokenizer import Message, Tokenizer

_ARCHITECTURE = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
_DIGITS = {"type": "Digits", "individual_digits": True}


def write_gguf(model: MiniMind, tokenizer: Tokenizer, path: str | Path) -> Path:
    """Write a model and its tokenizer as one GGUF file of float32 numbers.

    Raises:
        UserError: the package `gguf` is missing, or llama.cpp has no exact counterpart.
    """
    if not model.config.norm_topk_prob and model.config.use_moe:
        raise UserError("llama.cpp always normalises the chosen experts' weights; this model not.")
    gguf, path = needed("gguf", "gguf"), Path(path)
    writer = gguf.GGUFWriter(None, _ARCHITECTURE[family(model.config)])
    writer.add_name(path.stem)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _write_shape(writer, gguf, model.config)
    _write_tokenizer(writer, gguf, tokenizer, model.config.vocab_size)
    for name, tensor in gguf_tensors(model).items():
        writer.add_tensor(name, tensor)
    write_atomically(path, lambda file: _write_to(writer, file.name))
    return path


def _write_to(writer: Any, name: str) -> None:
    try:
        writer.write_header_to_file(Path(name))
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _write_shape(writer: Any, gguf: Any, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.use_moe:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.rope_scaling:
        _write_yarn(writer, gguf, config.rope_scaling)


def _write_yarn(writer: Any, gguf: Any, scaling: dict) -> None:
    if (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)) != (32, 1):
        raise UserError(f"llama.cpp reads no beta_fast or beta_slow from a GGUF: {scaling}")
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))
    default = 0.1 * math.log(scaling["factor"]) + 1  # llama.cpp multiplies by this by itself
    writer.add_rope_scaling_attn_factors(scaling.get("attention_factor", default) / default)


def _write_tokenizer(writer: Any, gguf: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    content = json.loads(tokenizer.to_json())
    writer.add_tokenizer_pre(pre_tokenizer(content))
    added = {token["id"]: token for token in content["added_tokens"]}
    words = {index: word for word, index in content["model"]["vocab"].items()}
    kinds, tokens, types = gguf.TokenType, [], []
    for index in range(vocab_size):
        token = added.get(index)
        kind = kinds.NORMAL if index in words else kinds.UNUSED
        if token:
            kind = kinds.CONTROL if token["special"] else kinds.USER_DEFINED
        tokens.append(token["content"] if token else words.get(index, f"[PAD{index}]"))
        types.append(kind)
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def pre_tokenizer(content: dict) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a `tokenizer.json`.

    Raises:
        UserError: it cuts text in a way for which llama.cpp has no name; the ids would differ.
    """
    steps = content["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    byte_level = steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space")
    plain = byte_level and steps[-1].get("use_regex", True) and not content["normalizer"]
    names = {"[]": "gpt-2", json.dumps([_DIGITS]): "smollm"}
    name = names.get(json.dumps(steps[:-1]))
    if name is None or not plain or (odd := _oddity(content)):
        what = json.dumps(steps) if name is None or not plain else odd
        raise UserError(
            f"llama.cpp has no tokenizer equal to one with {what}, so the GGUF would see other tokens "
            "than the model was trained on."
        )
    return name


def _oddity(content: dict) -> str | None:
    """Return what of a `tokenizer.json` llama.cpp does not compute, if there is something."""
    model, tokens = content["model"], content["added_tokens"]
    settings = (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "ignore_merges",
        "byte_fallback",
    )
    found = [f"{name}={model[name]!r}" for name in settings if model.get(name)]
    found += [f"{flag} of {token['content']!r}" for token in tokens
              for flag in ("lstrip", "rstrip", "single_word") if token[flag]]  # fmt: skip
    return found[0] if found else None if model["type"] == "BPE" else f"a {model['type']} model"


def gguf_tensors(model: MiniMind) -> dict[str, np.ndarray]:
    """Return the weights under llama.cpp's names: experts stacked, Llama's Q and K reordered."""
    config, found = model.config, {}
    stacks: dict[str, list[Tensor]] = {}
    for name, tensor in export_state(model).items():
        block, stem = _split(name.removesuffix(".weight"))
        if ".experts." in name:  # mlp.experts.3.gate_proj: in order, since state dicts are
            part = stem.split(".")[-1].removesuffix("_proj")
            stacks.setdefault(f"{block}ffn_{part}_exps", []).append(tensor)
            continue
        if not config.qk_norm and stem.endswith(("q_proj", "k_proj")):
            tensor = interleave(tensor, config.head_dim)
        found[f"{block}{_NAMES[stem]}.weight"] = tensor.numpy()
    for name, tensors in stacks.items():
        found[f"{name}.weight"] = np.stack([tensor.numpy() for tensor in tensors])
    return found


def _split(name: str) -> tuple[str, str]:
    """ "model.layers.3.mlp.gate" to ("blk.3.", "mlp.gate"); names outside blocks stay."""
    if not name.startswith("model.layers."):
        return "", name
    _, _, index, stem = name.split(".", 3)
    return f"blk.{index}.", stem


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of every head from half-split pairs (i, i + D/2) to neighbours (2i, 2i+1)."""
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[-1])  # (heads, half, pair, C)
    return halves.transpose(1, 2).reshape(weight.shape)


def open_gguf(path: str | Path) -> Any:
    """Return llama.cpp's server (in this process) with a GGUF, everything in float32.

    Raises:
        UserError: the package `xllamacpp` is missing, or llama.cpp cannot load the file.
    """
    llama = needed("xllamacpp", "gguf")
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if magic != b"GGUF":
        raise UserError(f"{path} is not a GGUF file: it starts with {magic!r}.")
    settings = llama.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 4096, 1, False, -1
    settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    settings.chat_template = CHAT_TEMPLATE  # the file's own, a program, is never run
    settings.api_keys = [secrets.token_urlsafe()]  # its HTTP server answers nobody
    settings.reasoning_format = llama.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    try:
        return llama.Server(settings)
    except Exception as error:  # the library's own kinds
        raise UserError(f"llama.cpp cannot load {path} ({error}).") from error


def gguf_chat(server: Any, messages: Sequence[Message], max_new_tokens: int = 128, temperature: float = 0.0,
              top_p: float = 1.0) -> str:  # fmt: skip
    """Return the assistant's answer from llama.cpp, sampled as `minimind.chat` samples.

    What llama.cpp filters by default beyond that (top-k 40, min-p) is switched off.

    Raises:
        UserError: llama.cpp gives no answer, or would take a setting for another one (-1 new tokens: no end).
    """
    if max_new_tokens < 1 or not temperature >= 0 or not 0 < top_p <= 1:
        raise UserError(
            f"max_new_tokens={max_new_tokens} must be at least 1, temperature={temperature} at least 0, "
            f"and top_p={top_p} above 0 and at most 1."
        )
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0, "min_p": 0}
    ask = {"messages": list(messages), "max_tokens": max_new_tokens, **sampling}
    answer = server.handle_chat_completions(ask)
    if "choices" not in answer:
        raise UserError(f"llama.cpp gave no answer: {answer.get('message', answer)}.")
    return answer["choices"][0]["message"]["content"]
