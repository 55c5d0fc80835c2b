"""Ways in and out: the same numbers in transformers, upstream's files in, strangers' files refused."""

import contextlib
import copy
import json
import zipfile

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import minimind
from minimind import MiniMind, ModelConfig, UserError
from minimind.checkpoint import fingerprint, save_weight
from minimind.interop import import_hf, load_upstream, stretch, trained_length, write_hf

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
KINDS = {
    "llama": {},
    "untied": {"tie_word_embeddings": False, "rope_theta": 1e4},
    "yarn": {"rope_scaling": YARN},
    "qwen3": {"qk_norm": True, "head_dim": 32, "rms_norm_eps": 1e-6},
    "qwen3_yarn": {"qk_norm": True, "rope_scaling": {**YARN, "attention_factor": 1.0}},
    "qwen3_moe": {"qk_norm": True, "use_moe": True, "moe_intermediate_size": 48, "num_experts": 5},
}


@pytest.fixture
def model_of(small_model, tokenizer):
    return lambda kind: small_model(vocab_size=tokenizer.vocab_size, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_transformers_computes_the_same_and_gives_it_back(kind, model_of, tokenizer, tmp_path):
    model, ids = model_of(kind), torch.randint(tokenizer.vocab_size, (2, 70))
    write_hf(model, tokenizer, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "back")  # its own way of writing the same model
    tokenizer.save(tmp_path / "back/tokenizer.json")
    for folder in ("out", "back"):
        again, _ = import_hf(tmp_path / folder)
        assert again.config == model.config
        assert torch.equal(again(ids), model(ids))


@torch.no_grad()
def test_generation_is_equal_token_for_token(model_of, tokenizer, tmp_path):
    model = model_of("qwen3")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(write_hf(model, tokenizer, tmp_path))
    prompts = torch.randint(7, tokenizer.vocab_size, (4, 9))
    ours = minimind.generate(model, prompts.tolist(), 20, temperature=0, eos_id=tokenizer.eos_id)
    for prompt, completion in zip(prompts, ours, strict=True):
        expected = theirs.generate(prompt[None], max_new_tokens=20, do_sample=False)[0, 9:]
        assert completion == expected.tolist()


def test_auto_tokenizer_gives_the_same_ids_and_the_template(model_of, tokenizer, tmp_path):
    write_hf(model_of("llama"), tokenizer, tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("12 + 345 <think>a</think>", " 你好，世界 🙂\n\n don't", "  two"):
        assert auto.encode(text) == tokenizer.encode(text)
        assert auto.decode(auto.encode(text), skip_special_tokens=True) == text
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hi\n"}]
    for prompt in (True, False):
        ids = auto.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
        assert ids == tokenizer.encode_chat(chat, add_generation_prompt=prompt)
    assert (auto.pad_token_id, auto.bos_token_id, auto.eos_token_id) == (0, 1, 2)


def test_a_named_weight_is_exported(model_of, tokenizer, tmp_path):
    save_weight(tmp_path / "full_sft_64.pth", model_of("llama"), tokenizer, [], {})
    minimind.export_hf("full_sft", tmp_path / "hf", out_dir=tmp_path)
    values = json.loads((tmp_path / "hf/config.json").read_text())
    assert values["rope_parameters"]["rope_theta"] == values["rope_theta"] == 1e6
    assert "lm_head.weight" not in load_file(tmp_path / "hf/model.safetensors")  # tied: stored once
    again, _ = minimind.load(tmp_path / "hf")
    assert again.config.rms_norm_eps == 1e-5 and not again.training


def test_what_has_no_exact_counterpart_is_refused(small_model, model_of, tokenizer, tmp_path):
    with pytest.raises(UserError, match="without qk_norm has no exact counterpart"):
        write_hf(small_model(use_moe=True), tokenizer, tmp_path)
    model = model_of("llama")
    model.model.layers[0].self_attn.q_proj.lora_a = torch.nn.Linear(3, 3)
    with pytest.raises(UserError, match="Merge them first"):
        write_hf(model, tokenizer, tmp_path)


FOREIGN = {
    "bias": ({"attention_bias": True}, "attention_bias=True"),
    "family": ({"model_type": "gpt2"}, "model_type='gpt2'"),
    "window": ({"use_sliding_window": True}, "use_sliding_window=True"),
    "windows": ({"layer_types": ["sliding_attention"] * 3}, "layer_types="),
    "scaling": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "RoPE scaling"),
    "half a scaling": ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "original_max_position"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "missing": ({"vocab_size": None}, "nothing about vocab_size"),
    "text": ({"hidden_size": "64"}, "hidden_size='64' is not a whole number"),
    "negative": ({"num_hidden_layers": -1}, "num_hidden_layers=-1 is not a whole number"),
    "not finite": ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is not a number"),
}  # fmt: skip


@pytest.mark.parametrize("change, words", FOREIGN.values(), ids=FOREIGN)
def test_a_config_that_means_another_model_is_refused(change, words, model_of, tokenizer, tmp_path):
    folder = write_hf(model_of("llama"), tokenizer, tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(UserError, match=words):
        import_hf(folder)


def upstream_file(model, path, tokenizer):
    """What upstream's stages save: a bare state dict in half precision, the tokenizer in ../model."""
    path.parent.mkdir(parents=True)
    torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, path)
    (path.parent.parent / "model").mkdir()
    tokenizer.save(path.parent.parent / "model/tokenizer.json")


UPSTREAM = {
    "the guide's": dict(num_attention_heads=8, rms_norm_eps=1e-5),
    "today's": dict(num_attention_heads=4, qk_norm=True, rms_norm_eps=1e-6, intermediate_size=256, head_dim=24),
    "today's experts": dict(num_attention_heads=4, qk_norm=True, rms_norm_eps=1e-6, use_moe=True,
                            num_experts=3, num_experts_per_tok=1, moe_intermediate_size=128),
}  # fmt: skip


@pytest.mark.parametrize("settings", UPSTREAM.values(), ids=UPSTREAM)
@torch.no_grad()
def test_upstream_weights_load(settings, small_model, tokenizer, tmp_path, capsys):
    model = small_model(vocab_size=tokenizer.vocab_size, **settings)
    upstream_file(model, tmp_path / "out/full_sft_64.pth", tokenizer)
    again, tokens = minimind.load("full_sft", out_dir=tmp_path / "out")
    told = capsys.readouterr().out
    for name, value in settings.items():
        assert getattr(again.config, name) == value
        assert f"'{name}': {value}" in told  # the inferred config is printed
    assert again.config.rope_theta == 1e6 and tokens.eos_id == 2
    rounded = MiniMind(model.config).eval()
    rounded.load_state_dict({name: t.half().float() for name, t in model.state_dict().items()})
    ids = torch.randint(tokenizer.vocab_size, (2, 33))
    assert torch.equal(again(ids), rounded(ids))


OTHER_FILES = {
    "older release": ({"tok_embeddings.weight": torch.ones(2, 2)}, "before May 2025"),
    "shared experts": ({"model.layers.0.mlp.shared_experts.0.up_proj.weight": torch.ones(2, 2)}, "shared expert"),
    "adapters": ({"model.layers.0.self_attn.q_proj.lora.A.weight": torch.ones(2, 2)}, "adapters only"),
    "resume point": ({"model": {}, "optimizer": {}, "step": 3}, "is a resume point"),
    "a list": ([1, 2], "not a state dict"),
    "another model": ({"wte.weight": torch.ones(2, 2)}, "no MiniMind weight"),
}  # fmt: skip


@pytest.mark.parametrize("content, words", OTHER_FILES.values(), ids=OTHER_FILES)
def test_other_kinds_of_pth_are_named(content, words, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=words):
        load_upstream(tmp_path / "x.pth")


def test_an_upstream_weight_needs_its_own_tokenizer(small_model, tokenizer, tmp_path):
    torch.save(small_model(num_attention_heads=8).state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match="needs its tokenizer"):
        minimind.load(tmp_path / "x.pth")
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(
        UserError, match=r"tokens and the model 120: it is the tokenizer of another"
    ):
        minimind.load(tmp_path / "x.pth")


def test_yarn_on_request(small_model, tokenizer, tmp_path):
    model = small_model(vocab_size=tokenizer.vocab_size)
    stages = [{"stage": "pretrain", "settings": {"max_seq_len": n}} for n in (96, 32)]
    save_weight(tmp_path / "full_sft_64.pth", model, tokenizer, stages, {})
    assert trained_length("full_sft", tmp_path) == 96
    longer = stretch(model, 4.0, 32)
    assert longer.config.max_position_embeddings == 128
    direct = small_model(vocab_size=tokenizer.vocab_size, rope_scaling=YARN)
    direct.load_state_dict(model.state_dict())
    ids = torch.randint(tokenizer.vocab_size, (1, 120))
    assert torch.equal(longer(ids), direct(ids)) and not torch.allclose(longer(ids), model(ids))
    with pytest.raises(UserError, match="factor"):
        stretch(model, 0.5, 32)


# Hostile files. None may run code, write outside its folder, or take memory that it does not fill.


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_an_upstream_weight_is_not_run(tmp_path):
    torch.save({"model.embed_tokens.weight": Bomb(tmp_path / "ran")}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="cannot be read"):
        minimind.load(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


ABSURD = {
    "10^12 parameters": {"hidden_size": 10**6, "vocab_size": 10**6},
    "10^9 layers": {"num_hidden_layers": 10**9},
    "beyond 64 bits": {"vocab_size": 10**30},
    "wide heads": {"head_dim": 2 * 10**9},
}


@pytest.mark.parametrize("shape", ABSURD.values(), ids=ABSURD)
def test_absurd_shapes_take_no_memory(shape, model_of, tokenizer, tmp_path):
    model = model_of("llama")
    folder = write_hf(model, tokenizer, tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **shape}))
    with pytest.raises(UserError, match=r"does not fit the model|not a whole number"):
        import_hf(folder)
    path = tmp_path / "full_sft_64.pth"  # the same in a weight of ours
    save_weight(path, model, tokenizer, [], {})
    sidecar = json.loads(path.with_suffix(".json").read_text())
    sidecar["config"].update(shape)
    path.with_suffix(".json").write_text(json.dumps(sidecar))
    with pytest.raises(UserError, match=r"does not fit the model|not a whole number"):
        minimind.load(path)


def test_tensors_that_claim_more_than_they_store(small_model, tmp_path):
    state = small_model(num_attention_heads=8).state_dict()
    huge = {
        name: torch.zeros(1).expand(10**6, 10**6)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    torch.save({**state, **huge}, tmp_path / "x.pth")
    assert (tmp_path / "x.pth").stat().st_size < 10**6
    with pytest.raises(UserError, match="stores less"):
        minimind.load(tmp_path / "x.pth")


def rewritten(path, change=lambda name, content: content, compress=zipfile.ZIP_STORED, times=1):
    """The archive of a weight with its records changed, compressed, or listed several times over."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, content in records:
            archive.writestr(name, change(name, content))
        for entry in list(archive.filelist) * (times - 1):
            again = copy.copy(entry)
            again.filename = f"{entry.filename}{len(archive.filelist)}"
            archive.filelist.append(again)
            archive._didModify = True


def shared(path):
    state, rows = torch.load(path), torch.randn(192, 64)
    for number in range(3):
        state[f"model.layers.{number}.self_attn.q_proj.weight"] = rows[:64]
        state[f"model.layers.{number}.mlp.up_proj.weight"] = rows
        state[f"model.layers.{number}.mlp.gate_proj.weight"] = rows
    torch.save(state, path)


HOSTILE_WEIGHTS = {
    "compressed": (lambda path: rewritten(path, compress=zipfile.ZIP_DEFLATED), "compressed"),
    "records many times over": (lambda path: rewritten(path, times=50), "claim more"),
    "a record cut short": (lambda path: rewritten(path, lambda name, c: c[:8] if name.endswith("/data/0") else c), "cannot be read"),
    "the format before 2020": (lambda path: torch.save(torch.load(path), path, _use_new_zipfile_serialization=False), "not a zip file"),
    "one storage for all": (shared, "stores less"),
    "a list": (lambda path: torch.save([1], path), "no weight"),
    "a score of another shape": (lambda path: torch.save({**torch.load(path), "score.weight": torch.ones(3)}, path), "score.weight"),
    "a score of words": (lambda path: torch.save({**torch.load(path), "score.weight": "high"}, path), "score.weight"),
}  # fmt: skip


@pytest.mark.parametrize("damage, words", HOSTILE_WEIGHTS.values(), ids=HOSTILE_WEIGHTS)
def test_hostile_weights(damage, words, model_of, tokenizer, tmp_path):
    path = tmp_path / "full_sft_64.pth"
    save_weight(path, model_of("llama"), tokenizer, [], {})
    damage(path)
    with pytest.raises(UserError, match=words):
        minimind.load(path)


ADAPTER = {
    "r": 2,
    "alpha": 4,
    "target_modules": ["q_proj"],
    "base_weight": "base_64.pth",
    "base_sha256": "0",
}
HOSTILE_SIDECARS = {
    "a config that is none": ({"config": [1]}, "of another kind"),
    "no tokenizer": ({"tokenizer": "x"}, "of another kind"),
    "stages of numbers": ({"stages": [1, 2]}, "cannot be read"),
    "stages that are none": ({"stages": 7}, "cannot be read"),
    "a stage without a name": ({"stages": [{}]}, "of another kind"),
    "settings that are none": ({"stages": [{"stage": "sft", "settings": 7}]}, "of another kind"),
    "an adapter that is none": ({"lora": 3}, "of another kind"),
    "half an adapter": ({"lora": {"r": 2}}, "of another kind"),
    "a rank of a billion": ({"lora": {**ADAPTER, "r": 10**9}}, "r=1000000000"),
    "a rank of words": ({"lora": {**ADAPTER, "r": "8"}}, "of another kind"),
    "a base that is a device": ({"lora": {**ADAPTER, "base_weight": "/dev/zero"}}, "is missing"),
    "its own base": ({"lora": {**ADAPTER, "base_weight": "full_sft_64.pth"}}, "an adapter to itself"),
}  # fmt: skip


@pytest.mark.parametrize("change, words", HOSTILE_SIDECARS.values(), ids=HOSTILE_SIDECARS)
def test_hostile_sidecars(change, words, model_of, tokenizer, tmp_path, capsys):
    path = tmp_path / "full_sft_64.pth"
    save_weight(path, model_of("llama"), tokenizer, [], {})
    if "lora" in change:
        matrices = {"lora_A.weight": torch.ones(2, 64), "lora_B.weight": torch.ones(64, 2)}
        torch.save({f"model.layers.0.self_attn.q_proj.{n}": t for n, t in matrices.items()}, path)
    sidecar = {**json.loads(path.with_suffix(".json").read_text()), **change}
    if isinstance(sidecar.get("lora"), dict) and path.name in sidecar["lora"].values():
        sidecar["lora"]["base_sha256"] = fingerprint(path)
    path.with_suffix(".json").write_text(json.dumps(sidecar))
    with pytest.raises(UserError, match=words):
        minimind.load(path)
    with contextlib.suppress(UserError):  # nor do these stumble
        trained_length(str(path))


def test_a_folder_with_code_and_paths_stays_in_its_folder(model_of, tokenizer, tmp_path):
    folder = write_hf(model_of("llama"), tokenizer, tmp_path / "hf")
    outside = tmp_path / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(outside)!r}, 'w')")
    values = json.loads((folder / "config.json").read_text())
    evil = {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}, "_name_or_path": "../../.."}
    (folder / "config.json").write_text(json.dumps({**values, **evil}))
    tricks = {"tokenizer_file": "../../etc/passwd", "auto_map": {"AutoTokenizer": "modeling_evil.T"},
              "chat_template": "{{ cycler.__init__.__globals__ }}"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(tricks))
    before = sorted(p for p in tmp_path.rglob("*"))
    model, tokens = import_hf(folder)
    minimind.chat(model, tokens, [{"role": "user", "content": "Hi"}], max_new_tokens=2)
    assert sorted(p for p in tmp_path.rglob("*")) == before and not outside.exists()
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="One file is read, not shards"):
        import_hf(folder)


DAMAGED = {
    "config.json": (b"[" * 100_000, "config.json cannot be read"),
    "model.safetensors": (b"\xff" * 64, "model.safetensors cannot be read"),
    "tokenizer.json": (b'{"model": {}}', "is not a tokenizer.json"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_folders(name, model_of, tokenizer, tmp_path):
    folder, (content, words) = write_hf(model_of("llama"), tokenizer, tmp_path), DAMAGED[name]
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        import_hf(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        import_hf(folder)


def test_tied_embeddings_that_differ_are_refused(model_of, tokenizer, tmp_path):
    folder = write_hf(model_of("llama"), tokenizer, tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file(
        {**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1},
        folder / "model.safetensors",
    )
    with pytest.raises(UserError, match="differ in the file"):
        import_hf(folder)


def test_only_yarn_is_a_scaling():
    with pytest.raises(UserError, match="not understood"):
        ModelConfig(
            rope_scaling={
                "rope_type": "linear",
                "factor": 2.0,
                "original_max_position_embeddings": 8,
            }
        )
