"""The command line as a user meets it: in a process of its own, wrong input included."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import SMALL, chats, texts, write_lines

import minimind
from minimind.config import data_samples

TOKENIZER = str(data_samples("tokenizer.json"))


def run(*arguments, cwd, **more):
    command = [sys.executable, "-m", "minimind", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **more)


def refused(*arguments, cwd):
    """The message of a refusal: exit code 2, one paragraph, no traceback."""
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def flags(folder, rows=None, **more):
    path = folder / "data.jsonl"
    if not path.exists():
        write_lines(path, rows or texts())
    settings = {**SMALL, "data_path": path, "tokenizer_path": TOKENIZER, "epochs": 1, **more}
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    done = run("pretrain", *flags(folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_leaves_the_files_of_the_guide(trained):
    assert (trained / "out/pretrain_32.pth").is_file()
    assert (trained / "checkpoints/pretrain_32_resume.pth").is_file()
    sidecar = json.loads((trained / "out/pretrain_32.json").read_text())
    assert sidecar["config"]["hidden_size"] == 32 and sidecar["stages"][0]["stage"] == "pretrain"


def test_chat_and_eval_use_a_weight(trained):
    done = run(
        "chat", "--weight", "pretrain", "--preset", "full", "--message", "Hello!", cwd=trained
    )
    assert done.returncode == 0 and done.stdout.strip()
    talk = run("chat", "--weight", "pretrain", "--preset", "full", cwd=trained, input="Hello!\n\n")
    assert talk.returncode == 0 and "model>" in talk.stdout
    done = run("eval", "--weight", "pretrain", "--preset", "full", cwd=trained)
    assert done.returncode == 0 and "bits_per_byte" in done.stdout and "→" in done.stdout


def test_the_guides_flags_are_taken(tmp_path):
    write_lines(tmp_path / "sft.jsonl", chats())
    flags_of_the_guide = flags(
        tmp_path, accumulation_steps=8, dtype="bfloat16", use_moe=1, from_resume=1
    )
    assert run("pretrain", *flags_of_the_guide, cwd=tmp_path).returncode == 0
    more = [*flags(tmp_path, use_moe=1), "--from_weight", "pretrain", "--data_path", "sft.jsonl"]
    assert run("sft", *more, cwd=tmp_path).returncode == 0
    assert (tmp_path / "out/full_sft_32.pth").is_file()


def test_bench_prints_speed_utilisation_and_memory(tmp_path):
    shape = ["--hidden_size", 64, "--num_hidden_layers", 2, "--batch_size", 2, "--max_seq_len", 32]
    less = ["--compile", 0, "--gradient_checkpointing", 0, "--repeats", 1, "--dtype", "float32"]
    done = run("bench", *shape, *less, "--vocab_size", 100, "--json", "b.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "b.json").read_text())
    assert {f["part"] for f in figures} >= {"training step", "chats", "time", "utilisation"}
    assert all(
        word in done.stdout for word in ("tokens/s", "utilisation", "peak memory", "GFLOP/s")
    )


BAD_FILES = {
    "missing": (None, "There is no data file bad.jsonl"),
    "empty": (b"", "bad.jsonl is empty"),
    "not json": (b'{"text": "a"}\nnonsense\n', "bad.jsonl, line 2: not JSON"),
    "no field": (b'{"txt": "a"}\n', "bad.jsonl, line 1: needs a field"),
    "not utf-8": (b'{"text": "\xff"}\n', "bad.jsonl, line 1: byte 11 is not UTF-8"),
}


@pytest.mark.parametrize("content, words", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_pretraining_files(content, words, tmp_path):
    if content is not None:
        (tmp_path / "bad.jsonl").write_bytes(content)
    assert words in refused("pretrain", *flags(tmp_path), "--data_path", "bad.jsonl", cwd=tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "messages, words",
    [([{"role": "robot", "content": "a"}], "has the role 'robot'"), ([{"role": "user", "content": "a"}], "nothing to learn")],
)  # fmt: skip
def test_bad_chat_files(messages, words, trained):
    write_lines(trained / "bad.jsonl", [*chats(1), {"conversations": messages}])
    error = refused(
        "sft", *flags(trained), "--from_weight", "pretrain", "--data_path", "bad.jsonl", cwd=trained
    )
    assert words in error and "bad.jsonl, line 2" in error


def test_unknown_names_list_the_near_misses(tmp_path):
    assert "--learning_rate" in refused("pretrain", "--lerning_rate", 1, cwd=tmp_path)
    assert "'course'" in refused("pretrain", "--preset", "cuorse", cwd=tmp_path)
    assert "'pretrain'" in refused("pretrian", cwd=tmp_path)
    assert "must be above 0" in refused("pretrain", "--batch_size", 0, cwd=tmp_path)
    assert "'bfloat16'" in refused("pretrain", "--dtype", "bfloat61", cwd=tmp_path)
    with pytest.raises(minimind.UserError, match="Did you mean 'learning_rate'"):
        minimind.train("pretrain", learnin_rate=1)
    with pytest.raises(minimind.UserError, match="Did you mean 'pretrain'"):
        minimind.train("pretrian")


def test_missing_and_damaged_weights(trained, tmp_path):
    assert "Make it with: minimind sft" in refused("chat", "--preset", "full", cwd=trained)
    error = refused("sft", *flags(tmp_path, chats()), cwd=tmp_path)
    assert "Make it with: minimind pretrain" in error
    whole = (trained / "out/pretrain_32.pth").read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("junk", b"not a checkpoint")):
        (tmp_path / f"{name}.pth").write_bytes(content)
        (tmp_path / f"{name}.json").write_bytes((trained / "out/pretrain_32.json").read_bytes())
        assert "cannot be read" in refused(
            "chat", "--weight", f"{name}.pth", "--message", "a", cwd=tmp_path
        )


def test_a_weight_that_does_not_fit_its_config(trained, tmp_path):
    sidecar = json.loads((trained / "out/pretrain_32.json").read_text())
    sidecar["config"]["num_hidden_layers"] = 4
    (tmp_path / "odd.pth").write_bytes((trained / "out/pretrain_32.pth").read_bytes())
    (tmp_path / "odd.json").write_text(json.dumps(sidecar))
    error = refused("chat", "--weight", "odd.pth", "--message", "a", cwd=tmp_path)
    assert "does not fit the model" in error and "missing" in error


def test_code_in_a_checkpoint_is_not_run(trained, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"a": Bomb()}, tmp_path / "bomb.pth")
    (tmp_path / "bomb.json").write_bytes((trained / "out/pretrain_32.json").read_bytes())
    assert "cannot be read" in refused(
        "chat", "--weight", "bomb.pth", "--message", "a", cwd=tmp_path
    )
    assert not (tmp_path / "ran").exists()


def test_help_names_every_command(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert all(
        word in done.stdout for word in ("pretrain", "sft", "course", "chat", "eval", "bench")
    )
