import contextlib
import errno
import io
import json
import os
import shutil
import subprocess

import pytest
import torch
from helpers import SMALL, texts, write_lines

import minimind
from minimind import UserError, load
from minimind.checkpoint import (
    before,
    find_weight,
    load_state,
    newest_resume,
    read_tensors,
    save_weight,
    write_atomically,
    write_resume,
)
from minimind.config import data_samples


class FullDisk:
    """Takes a few bytes, then fails as a full disk does."""

    def __call__(self, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "weight.pth"
    path.write_bytes(b"the old weight")
    with pytest.raises(UserError, match=r"No space left on device.*unharmed"):
        write_atomically(path, FullDisk())
    assert path.read_bytes() == b"the old weight"
    assert [p.name for p in tmp_path.iterdir()] == ["weight.pth"]


def test_a_planted_link_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/weight.pth.partial").symlink_to(victim)
    write_atomically(tmp_path / "out/weight.pth", lambda file: file.write(b"numbers"))
    assert victim.read_text() == "precious"
    assert (tmp_path / "out/weight.pth").read_bytes() == b"numbers"
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match=r"Could not write .*out/weight.pth"):
        write_atomically(tmp_path / "out/weight.pth", lambda file: file.write(b"numbers"))


def test_a_weight_comes_back_as_it_was(tmp_path, small_model, tokenizer):
    model = small_model(vocab_size=tokenizer.vocab_size, qk_norm=True)
    save_weight(tmp_path / "full_sft_64.pth", model, tokenizer, [{"stage": "sft"}], {"loss": 1.0})
    again, tokens = load("full_sft", out_dir=tmp_path)
    assert again.config == model.config and not again.training
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert tokens.encode("The job of") == tokenizer.encode("The job of")
    assert load(str(tmp_path / "full_sft_64.pth"))[0].config == model.config
    names = set(read_tensors(tmp_path / "full_sft_64.pth"))
    assert {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "lm_head.weight",
    } <= names


def test_every_key_must_fit(small_model):
    model = small_model()
    state = dict(model.state_dict())
    deeper = dict(small_model(num_hidden_layers=4).state_dict())
    with pytest.raises(UserError, match="unexpected"):
        load_state(model, deeper, "a file")
    wrong = {**state, "model.norm.weight": torch.ones(5)}
    with pytest.raises(UserError, match=r"misshapen.*\(5,\) in the file and \(64,\)"):
        load_state(model, wrong, "a file")
    del state["model.norm.weight"]
    with pytest.raises(UserError, match=r"1 missing \(such as model.norm.weight\)"):
        load_state(model, state, "a file")


def test_two_sizes_of_one_weight_must_be_told_apart(tmp_path, small_model, tokenizer):
    for hidden in (32, 64):
        model = small_model(vocab_size=tokenizer.vocab_size, hidden_size=hidden)
        save_weight(tmp_path / f"pretrain_{hidden}.pth", model, tokenizer, [], {})
    with pytest.raises(UserError, match="several weights"):
        find_weight("pretrain", tmp_path)
    assert find_weight("pretrain_32", tmp_path).name == "pretrain_32.pth"


def two_points(folder):
    path = folder / "x_resume.pth"
    for step in (1, 2, 3):
        write_resume(path, {"step": step, "model": {"w": torch.arange(50_000.0) + step}})
    return path


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 0x10
    path.write_bytes(data)


def cut(path, place=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * place)])


def test_two_resume_points_are_kept_and_the_newest_is_found(tmp_path):
    path = two_points(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x_resume.pth", "x_resume_before.pth"]
    assert newest_resume(path)[0]["step"] == 3 and read_tensors(before(path))["step"] == 2
    path.unlink()  # a kill between the two renames leaves only this
    point, file = newest_resume(path)
    assert point["step"] == 2 and file == before(path)
    before(path).unlink()
    assert newest_resume(path) is None


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_damaged_point_falls_back_to_the_one_before(damage, place, tmp_path, capsys):
    path = two_points(tmp_path)
    damage(path, place)
    if damage is flip:  # PyTorch itself would not have noticed
        assert not torch.equal(torch.load(path)["model"]["w"], torch.arange(50_000.0) + 3)
    point, _ = newest_resume(path)
    assert point["step"] == 2 and torch.equal(point["model"]["w"], torch.arange(50_000.0) + 2)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and f"{path} is damaged" in printed and "step 2" in printed
    damage(before(path))
    with pytest.raises(
        UserError, match=r"x_resume.pth and .*x_resume_before.pth are damaged.*from_resume=0"
    ):
        newest_resume(path)  # fmt: skip


def test_a_weight_with_a_flipped_bit_is_refused(tmp_path, small_model, tokenizer):
    path = tmp_path / "pretrain_64.pth"
    save_weight(path, small_model(vocab_size=tokenizer.vocab_size), tokenizer, [], {})
    flip(path)
    with pytest.raises(UserError, match="checksum"):
        load("pretrain", tmp_path)


def settings_for(folder, **more):
    return {**SMALL, "data_path": write_lines(folder / "pretrain.jsonl", texts()), "out_dir": str(folder / "out"),
            "tokenizer_path": str(data_samples("tokenizer.json")), **more}  # fmt: skip


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_run_goes_on_from_the_point_before_bit_for_bit(damage, tmp_path, capsys):
    settings = settings_for(tmp_path)
    whole = minimind.train("pretrain", **settings)
    wanted, point = (
        read_tensors(whole.weight_path),
        tmp_path / "out/checkpoints/pretrain_32_resume.pth",
    )
    assert (read_tensors(point)["step"], read_tensors(before(point))["step"]) == (14, 12)
    damage(point)
    again = minimind.train("pretrain", **settings, from_resume=1)
    assert "Going on from the point before" in capsys.readouterr().out
    assert [row["loss"] for row in again.history] == [row["loss"] for row in whole.history]
    found = read_tensors(again.weight_path)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_after_falling_back_costs_nothing(renames, tmp_path, monkeypatch):
    settings = settings_for(tmp_path, epochs=1)
    whole = minimind.train("pretrain", **settings)
    wanted = read_tensors(whole.weight_path)
    point = tmp_path / "out/checkpoints/pretrain_32_resume.pth"
    flip(point)
    replace, left = os.replace, iter(range(renames))

    def kill(source, target):
        if "resume" in str(source) and next(left, None) is None:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", kill)
        minimind.train("pretrain", **settings, from_resume=1)
    assert newest_resume(point)[0]["step"] == 6
    again = minimind.train("pretrain", **settings, from_resume=1)
    found = read_tensors(again.weight_path)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


class SmallDisk:
    """A disk of 5 MB, which really fills up."""

    def __init__(self, folder):
        self.folder = folder
        mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small disk is not permitted here")

    def fill(self):
        with contextlib.suppress(OSError), (self.folder / "filler").open("wb", 0) as file:
            while True:
                file.write(bytes(4096))

    def free(self):
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self):
        subprocess.run(["umount", str(self.folder)], check=True)


class SizeLimit:
    """Writes beyond 300 kB fail, as they do where a user's quota ends."""

    def __init__(self, folder):
        self.resource = pytest.importorskip("resource")
        self.before = self.resource.getrlimit(self.resource.RLIMIT_FSIZE)

    def fill(self):
        self.resource.setrlimit(self.resource.RLIMIT_FSIZE, (300_000, self.before[1]))

    def free(self):
        self.resource.setrlimit(self.resource.RLIMIT_FSIZE, self.before)

    close = free


@pytest.fixture(params=[SmallDisk, SizeLimit])
def disk(request, tmp_path):
    found = request.param(tmp_path)
    yield found
    found.close()


def test_a_disk_that_is_full_for_a_while_costs_nothing(disk, tmp_path, capsys):
    points = tmp_path / "out/checkpoints"
    settings = settings_for(tmp_path, save_interval=2)
    whole = minimind.train("pretrain", **settings)
    wanted = read_tensors(whole.weight_path)

    def callback(step, model):
        if step == 5:
            disk.fill()
        if step == 9:
            names = sorted(p.name for p in points.iterdir())
            assert names == ["pretrain_32_resume.pth", "pretrain_32_resume_before.pth"]
            assert newest_resume(points / names[0])[0]["step"] == 4  # 6 and 8 did not get through
            disk.free()

    shutil.rmtree(tmp_path / "out")
    again = minimind.train("pretrain", callback=callback, **settings)
    printed = capsys.readouterr().out
    assert printed.count("Could not write") == 2 and "the next save tries again" in printed
    logged = [json.loads(line) for line in (tmp_path / "out/pretrain_32.log.jsonl").open()]
    assert logged == again.history  # also the rows that found the disk full
    found = read_tensors(again.weight_path)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_a_disk_that_stays_full_keeps_the_old_weight_and_point(disk, tmp_path):
    settings = settings_for(tmp_path, save_interval=2)
    whole = minimind.train("pretrain", **settings)
    wanted = whole.weight_path.read_bytes()
    shutil.rmtree(tmp_path / "out/checkpoints")
    with pytest.raises(UserError, match=r"Could not write .*pretrain_32.pth.*unharmed"):
        minimind.train("pretrain", callback=lambda step, _: step == 5 and disk.fill(), **settings)
    assert whole.weight_path.read_bytes() == wanted
    disk.free()
    point = tmp_path / "out/checkpoints/pretrain_32_resume.pth"
    assert newest_resume(point)[0]["step"] == 4
    minimind.train("pretrain", **settings, from_resume=1)
    found, old = read_tensors(whole.weight_path), torch.load(io.BytesIO(wanted))
    assert all(torch.equal(found[n], old[n]) for n in old)
