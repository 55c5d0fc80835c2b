"""The commands that lead in and out, in one process (the others of the command line: test_cli.py)."""

import pytest
import torch
import transformers
from helpers import write_lines

from minimind import UserError, chat
from minimind.checkpoint import save_weight
from minimind.cli import dispatch


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
    expected = chat(weight, tokenizer, [{"role": "user", "content": "Hello!"}], 8)
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
        "a",
        "--max_new_tokens",
        8,
    )
    assert "read as upstream MiniMind of today's version" in told
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
    for name in ("..%2f..%2fetc_64", "a b;c_64", "_hf"):
        for end in (".pth", ".json"):
            (here / f"out/{name}{end}").write_bytes((here / f"out/full_sft_64{end}").read_bytes())
        before = {p for p in here.rglob("*") if (here / "out") not in p.parents}
        dispatch(["export", "--weight", f"out/{name}.pth", "--gguf"])
        assert (here / f"out/{name}.gguf").is_file()
        assert {p for p in here.rglob("*") if (here / "out") not in p.parents} == before


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
