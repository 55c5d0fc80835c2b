"""GGUF in real llama.cpp: the same log-probabilities, the same ids, the same greedy text."""

import json
import random
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import torch

import minimind
from minimind import UserError
from minimind.config import data_samples
from minimind.data import check_conversation, read_jsonl
from minimind.gguf import gguf_chat, interleave, open_gguf, pre_tokenizer, write_gguf

HALF = "\ufffd"  # of a character, which llama.cpp keeps for itself
KEY = "known to the tests alone"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
KINDS = {
    "llama": {},
    "llama_yarn": {"rope_scaling": YARN, "tie_word_embeddings": False},
    "qwen3": {"qk_norm": True, "head_dim": 32, "rope_theta": 1e4, "rms_norm_eps": 1e-6},
    "qwen3_yarn": {"qk_norm": True, "rope_scaling": {**YARN, "attention_factor": 1.0}},
    "qwen3_moe": {"qk_norm": True, "use_moe": True, "moe_intermediate_size": 48, "num_experts": 5},
}


def llama_cpp(model, tokenizer, folder):
    return open_gguf(write_gguf(model, tokenizer, folder / "model.gguf"))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_first_step_log_probabilities_equal_ours(kind, small_model, tokenizer, tmp_path):
    model = small_model(vocab_size=tokenizer.vocab_size, **KINDS[kind])
    ids = torch.randint(7, tokenizer.vocab_size, (1, 90))
    plain = [[tokenizer.encode("a")[0], 1000.0]]  # figures come with whole characters only: say "a"
    ask = {"n_predict": 1, "n_probs": tokenizer.vocab_size, "temperature": 0, "logit_bias": plain}
    ask["prompt"] = ids[0].tolist()
    answer = llama_cpp(model, tokenizer, tmp_path).handle_completions(ask)
    first = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert len(first) == tokenizer.vocab_size and answer["usage"]["prompt_tokens"] == 90
    theirs = torch.zeros(tokenizer.vocab_size)
    for token in first:
        theirs[token["id"]] = token["logprob"]
    torch.testing.assert_close(theirs, model(ids)[0, -1].log_softmax(-1), atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def served(tokenizer, tmp_path_factory):
    torch.manual_seed(1)
    config = minimind.ModelConfig(tokenizer.vocab_size, 64, 2, 4, qk_norm=True)
    model = minimind.MiniMind(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1) if parameter.ndim > 1 else parameter.data.uniform_(0.5, 1.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secrets.token_urlsafe", lambda: KEY)
        return model, llama_cpp(model, tokenizer, tmp_path_factory.mktemp("gguf"))


def post(server, path, body, key=KEY):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), headers
    )
    return json.loads(urllib.request.urlopen(request, timeout=20).read())


def test_llama_cpp_cuts_any_text_into_the_same_tokens(served, tokenizer):
    pieces = [*"ab cDé  \n\n\t'sSt01２9½Ⅷ你好，。🙂<>|/-_+=?.\u00a0\u3000\u200b\u0301אב", "<think>", "</answer>", "'ll", "\r\n", "<|im_end|>"]  # fmt: skip
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 25)))
        found = post(served[1], "/tokenize", {"content": text, "parse_special": False})["tokens"]
        assert found == tokenizer.encode(text), repr(text)


def test_llama_cpp_writes_the_chat_template_with_the_same_tokens(served, tokenizer):
    rows = read_jsonl(data_samples("sft_heldout.jsonl"), check_conversation)
    chats = [row["conversations"][:-1] for row in rows[::60]]
    chats += [
        [{"role": "user", "content": text}] for text in ("", "  two", "\n\none", "12 <think>\n")
    ]
    for chat in chats:
        text = post(served[1], "/apply-template", {"messages": chat})["prompt"]
        found = post(served[1], "/tokenize", {"content": text, "parse_special": True})["tokens"]
        assert found == tokenizer.encode_chat(chat, add_generation_prompt=True)


def test_greedy_chat_is_equal(served, tokenizer):
    model, server = served
    for text in ("Hello!", "What is 17+8?", "你好"):
        messages = [{"role": "user", "content": text}]
        ours = minimind.chat(model, tokenizer, messages, max_new_tokens=12)
        assert gguf_chat(server, messages, max_new_tokens=12) == ours


@pytest.mark.parametrize(
    "setting",
    [{"max_new_tokens": 0}, {"max_new_tokens": -1}, {"temperature": -1.0}, {"top_p": 0.0}],
)
def test_settings_without_a_meaning_are_refused(setting, served):
    (name, value) = next(iter(setting.items()))
    with pytest.raises(UserError, match=f"{name}={value} "):
        gguf_chat(served[1], [{"role": "user", "content": "a"}], **setting)


def test_nobody_else_can_talk_to_the_server_of_llama_cpp(small_model, tokenizer, tmp_path):
    model = small_model(vocab_size=tokenizer.vocab_size)
    servers = [llama_cpp(model, tokenizer, tmp_path) for _ in range(2)]
    for path in ("/tokenize", "/v1/chat/completions", "/completion"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            post(servers[0], path, {"content": "a", "prompt": "a"}, key="")
    assert gguf_chat(servers[0], [{"role": "user", "content": "a"}], 3)


HOSTILE = """
import gguf, sys
from minimind.gguf import gguf_chat, open_gguf
template = gguf.GGUFReader(sys.argv[1]).fields["tokenizer.chat_template"].contents()
assert template.startswith("{% for a in range(100000) %}")
print(repr(gguf_chat(open_gguf(sys.argv[1]), [{"role": "user", "content": "Hello!"}], 8)))
"""


def test_a_template_in_the_file_is_not_run(small_model, tokenizer, tmp_path, monkeypatch):
    nested = "{% for a in range(100000) %}" * 2 + "{% endfor %}" * 2
    monkeypatch.setattr("minimind.gguf.CHAT_TEMPLATE", nested)
    model = small_model(vocab_size=tokenizer.vocab_size)
    path = write_gguf(model, tokenizer, tmp_path / "model.gguf")
    arguments = [sys.executable, "-c", HOSTILE, str(path)]
    said = subprocess.check_output(arguments, timeout=60, text=True)
    ours = minimind.chat(model, tokenizer, [{"role": "user", "content": "Hello!"}], 8)
    assert said == f"{ours.rstrip(HALF)!r}\n"


def test_a_planted_link_is_not_written_through(small_model, tokenizer, tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "model.gguf.partial").symlink_to(tmp_path / "victim")
    write_gguf(small_model(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "model.gguf")
    assert (tmp_path / "victim").read_text() == "precious"
    with pytest.raises(UserError, match="Could not write"):
        model = small_model(vocab_size=tokenizer.vocab_size)
        write_gguf(model, tokenizer, tmp_path / "victim/model.gguf")


def test_neighbours_of_llama_are_our_halves():
    rows = torch.arange(12.0)[:, None]  # two heads of six rows
    assert interleave(rows, 6)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


REFUSED = {
    "experts without q/k norm": ({"use_moe": True}, "without qk_norm"),
    "weights not normalised": ({"use_moe": True, "qk_norm": True, "norm_topk_prob": False}, "always normalises"),
    "another ramp": ({"rope_scaling": {**YARN, "beta_slow": 0.5}}, "beta_slow"),
}  # fmt: skip


@pytest.mark.parametrize("settings, words", REFUSED.values(), ids=REFUSED)
def test_what_llama_cpp_computes_differently_is_refused(
    settings, words, small_model, tokenizer, tmp_path
):
    model = small_model(vocab_size=tokenizer.vocab_size, **settings)
    with pytest.raises(UserError, match=words):
        write_gguf(model, tokenizer, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_a_pre_tokenizer_without_a_name_is_refused(tokenizer):
    content = json.loads(tokenizer.to_json())
    assert pre_tokenizer(content) == "smollm"
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert pre_tokenizer(content) == "gpt-2"
    plain = content["added_tokens"][3]
    for change, words in (
        ({"model": {**content["model"], "continuing_subword_prefix": "##"}}, "subword_prefix='##'"),
        ({"model": {**content["model"], "dropout": 0.1}}, "dropout=0.1"),
        ({"added_tokens": [{**plain, "lstrip": True}]}, "lstrip of '<think>'"),
        ({"added_tokens": [{**plain, "rstrip": True}]}, "rstrip of '<think>'"),
        ({"added_tokens": [{**plain, "single_word": True}]}, "single_word of '<think>'"),
    ):
        with pytest.raises(UserError, match=words):
            pre_tokenizer({**content, **change})
    content["pre_tokenizer"] = {"type": "Whitespace"}
    with pytest.raises(UserError, match="other tokens than the model was trained on"):
        pre_tokenizer(content)


def test_files_that_are_no_gguf(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        open_gguf(tmp_path / "none.gguf")
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="is not a GGUF file"):
        open_gguf(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
    with pytest.raises(UserError, match=r"llama\.cpp cannot load"):
        open_gguf(tmp_path / "x.gguf")
