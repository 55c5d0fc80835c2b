import errno

import pytest
import torch

from minimind import UserError, load
from minimind.checkpoint import find_weight, load_state, read_tensors, save_weight, write_atomically


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
