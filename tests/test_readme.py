"""Every command that the README shows is parsed and run, made small."""

import re
import shlex
from pathlib import Path

import pytest

from minimind import cli
from minimind.config import CONFIGS, data_samples

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)[1:]
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("minimind ")
]
SMALL = (
    "--preset tiny --epochs 0.01 --batch_size 2 --accumulation_steps 1 --dtype float32 --device cpu"
)
SHAPE = " --hidden_size 64 --num_hidden_layers 2"
MORE = {
    "pretrain": SHAPE + " --epochs 0.001",
    "grpo": " --max_new_tokens 8 --epochs 0.0005 --reward_model_path ''",
    "spo": " --max_new_tokens 8 --epochs 0.0005 --reward_model_path ''",
    "distill": " --teacher_hidden_size 64 --teacher_num_layers 2 --student_hidden_size 64 --student_num_layers 1",
}


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


def test_the_readme_shows_every_stage():
    assert {command[0] for command in COMMANDS} == {*CONFIGS, "eval", "chat", "download", "prepare"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_commands_of_the_readme_run(command, out_dir, capsys, monkeypatch):
    """In the README's order, into one folder: each finds the weight that it starts from."""
    stage, flags = command[0], list(command[1:])
    if stage in CONFIGS:
        cli.parse(CONFIGS[stage], flags, stage)  # the very flags, as they stand
        stem = {"spo": "grpo", "reward": "dpo"}.get(stage, stage)
        path = data_samples(f"{stem}.jsonl")
        flags += shlex.split(f"{SMALL}{MORE.get(stage, '')} --data_path {path} --out_dir {out_dir}")
        cli.dispatch([stage, *flags])
        assert "Saved" in capsys.readouterr().out
    elif (
        stage == "download"
    ):  # parsed alone: gigabytes; test_download.py fetches from a server of its own
        asked = cli.parse(cli.Download, flags, stage)
        assert {f"{asked.to}/{name}.jsonl" for name in asked.names} < {
            c().data_path for c in CONFIGS.values()
        }
    elif stage == "prepare":
        cli.parse(cli.Prepare, flags, stage)
        source = data_samples("pretrain_heldout.jsonl")
        paths = f"--data_path {source} --tokenizer_path {data_samples('tokenizer.json')} --to {out_dir}/text.tokens"
        cli.dispatch([stage, *flags, *shlex.split(paths)])
        assert "Ready" in capsys.readouterr().out
    else:
        monkeypatch.setattr("builtins.input", lambda _: "")
        cli.dispatch([stage, *flags, "--out_dir", str(out_dir)])
