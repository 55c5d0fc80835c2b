"""The commands that lead in and out, in one process (the others of the command line: test_cli.py)."""

import pytest
import torch
import transformers
from helpers import write_lines

from minimind import MiniMind, ModelConfig, UserError, chat
from minimind.checkpoint import save_weight
from minimind.cli import dispatch
from minimind.interop import import_hf

HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def weight(here, small_model, tokenizer):
    """A weight in out/ of the current folder, and the model that it holds."""
    model = small_model(vocab_size=tokenizer.vocab_size, qk_norm=True)
    stages = [{"stage": "sft", "settings": {"max_seq_len": 32}}]
    save_weight(here / "out/full_sft_64.pth", model, tokenizer, stages, {})
    return model


def said(capsys, *arguments):
    dispatch([*map(str, arguments), "--preset", "full"])
    return capsys.readouterr().out


def test_one_answer_from_every_format(weight, tokenizer, here, capsys):
    assert "out/full_sft_64_hf" in said(capsys, "export")
    assert "out/full_sft_64.gguf" in said(capsys, "export", "--gguf")
    assert "again.gguf" in said(
        capsys, "export", "--weight", "out/full_sft_64_hf", "--gguf", "--to", "again.gguf"
    )
    (here / "upstream").mkdir()  # without a sidecar it is upstream's
    state = {name: tensor.half() for name, tensor in weight.state_dict().items()}
    torch.save(state, here / "upstream/full_sft_64.pth")
    tokenizer.save(here / "upstream/tokenizer.json")
    expected = chat(weight, tokenizer, HELLO, 8)
    sources = [
        "full_sft",
        "out/full_sft_64.pth",
        "out/full_sft_64_hf",
        "out/full_sft_64.gguf",
        "again.gguf",
    ]
    for source in sources:
        flags = "--weight", source, "--message", "Hello!", "--max_new_tokens", 8
        assert said(capsys, "chat", *flags) == expected + "\n", source
    told = said(
        capsys,
        "chat",
        "--weight",
        "upstream/full_sft_64.pth",
        "--message",
        "Hello!",
        "--max_new_tokens",
        8,
    )
    config = {**weight.config.to_dict(), "rms_norm_eps": 1e-6}  # today's, which no shape tells
    same = MiniMind(ModelConfig.from_dict(config)).eval()
    same.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    assert "read as upstream MiniMind of today's version" in told
    assert told.endswith("}\n" + chat(same, tokenizer, HELLO, 8) + "\n")
    transformers.AutoModelForCausalLM.from_pretrained(here / "out/full_sft_64_hf")


def test_scores_of_a_text_and_of_questions(weight, here, capsys):
    (here / "t.txt").write_text("The job of Quin is baker. " * 40)
    told = said(capsys, "eval", "--text_path", "t.txt", "--length", 64)
    assert "bits per byte" in told and "in the first 32 of a window" in told
    stretched = said(capsys, "eval", "--text_path", "t.txt", "--yarn_factor", 2)
    assert (
        "in windows of 64" in stretched
        and stretched.split("window,")[1] != told.split("window,")[1]
    )
    rows = [
        {"question": f"{i}+1 is", "choices": ["1", "2", "3", "4"], "answer": i % 4}
        for i in range(8)
    ]
    told = said(capsys, "eval", "--choices_path", write_lines(here / "q.jsonl", rows), "--as_chat")
    assert "8 questions as chat" in told and "chance 0.250" in told and "95%" in told


def test_an_export_stays_beside_its_weight(weight, here):
    (here / "out/a").mkdir()
    (here / "etc_64.gguf").write_text("precious")  # where the first name leads if %2f is decoded
    for name in ("..%2f..%2fetc_64", "a b;c_64", "_hf"):
        for end in (".pth", ".json"):
            (here / f"out/a/{name}{end}").write_bytes((here / f"out/full_sft_64{end}").read_bytes())
        before = contents(here, name)
        dispatch(["export", "--weight", f"out/a/{name}.pth", "--gguf"])
        assert (here / f"out/a/{name}.gguf").is_file()
        assert contents(here, name) == before


def contents(here, name):
    """What every file holds, in the folder and below it, but for the export of this name."""
    files = (path for path in here.rglob("*") if path.is_file() and path.name != f"{name}.gguf")
    return {path: path.read_bytes() for path in files}


def test_an_export_is_beside_the_weight_that_was_read(weight, here):
    (here / "full_sft").mkdir()  # not the weight, though it has its name
    dispatch(["export", "--preset", "full"])
    assert (here / "out/full_sft_64_hf/config.json").is_file()
    assert not (here / "full_sft_hf").exists()


def test_a_stretched_export_leaves_the_plain_one(weight, here, capsys):
    for end, flags in (("_hf", []), (".gguf", ["--gguf"])):
        dispatch(["export", "--preset", "full", *flags])
        before = contents(here, "none")
        assert f"full_sft_64_yarn4{end}" in said(capsys, "export", "--yarn_factor", 4, *flags)
        after = contents(here, "none")
        assert {path: after[path] for path in before} == before and len(after) > len(before)


def test_upstreams_yarn_has_its_own_attention_factor(weight, tokenizer, here, capsys):
    (here / "upstream").mkdir()
    state = {name: tensor.half() for name, tensor in weight.state_dict().items()}
    torch.save(state, here / "upstream/full_sft_64.pth")
    tokenizer.save(here / "upstream/tokenizer.json")
    flags = "--yarn_factor", 4, "--yarn_from", 32, "--to", "hf"
    said(capsys, "export", "--weight", "upstream/full_sft_64.pth", *flags)
    assert import_hf("hf")[0].config.rope_scaling["attention_factor"] == 1.0
    said(capsys, "export", *flags)
    assert "attention_factor" not in import_hf("hf")[0].config.rope_scaling


@pytest.mark.parametrize(
    "flags, words",
    [(["export", "--to", "a_file"], "Could not write a_file"), (["export", "--gguf", "--to", "out"], "Could not write out"),
     (["eval", "--text_path", "a_file", "--length", "-5"], "length=-5")],
)  # fmt: skip
def test_flags_that_cannot_be_followed(flags, words, weight, here):
    (here / "a_file").write_text("precious")
    with pytest.raises(UserError, match=words):
        dispatch([*flags, "--preset", "full"])
    assert (here / "a_file").read_text() == "precious"


def test_refusals(weight, here):
    with pytest.raises(UserError, match=r"run by llama\.cpp"):
        dispatch(["eval", "--weight", "x.gguf"])
    with pytest.raises(UserError, match="carries its own scaling"):
        dispatch(["chat", "--weight", "x.gguf", "--yarn_factor", "2"])
    with pytest.raises(UserError, match=r"Did you mean 'sft'"):
        dispatch(["eval", "--preset", "full", "--stage", "sfft"])
    with pytest.raises(UserError, match="--yarn_from"):
        torch.save({}, here / "out/b_64.pth")
        dispatch(["export", "--preset", "full"])
        dispatch(["chat", "--weight", "out/full_sft_64_hf", "--yarn_factor", "2", "--message", "a"])
