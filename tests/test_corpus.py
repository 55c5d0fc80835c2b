import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from helpers import SMALL, chats, texts, write_lines

import minimind
from minimind import Tokenizer, UserError, cli, corpus
from minimind.checkpoint import fingerprint
from minimind.config import data_samples
from minimind.corpus import (
    HEADER,
    Encoder,
    index_rows,
    open_tokens,
    prepare,
    read_header,
    read_tokens,
)
from minimind.data import check_conversation, check_text, pack, read_jsonl
from minimind.stages.sft import encode_chat_row, read_chats

# The token file


@pytest.fixture
def source(tmp_path):
    return write_lines(tmp_path / "text.jsonl", texts(300))


def stream(source, tokenizer):
    return pack([row["text"] for row in read_jsonl(source, check_text)], tokenizer, 8).tokens


@pytest.mark.parametrize("part", [100, 3000, 2**22])
def test_a_token_file_holds_what_pack_gives(source, tokenizer, part, monkeypatch):
    monkeypatch.setattr(corpus, "PART", part)
    path = prepare(source, tokenizer)
    tokens, skipped = open_tokens(path, tokenizer)
    assert path.suffix == ".tokens" and isinstance(tokens, np.memmap) and tokens.dtype == np.uint16
    assert np.array_equal(tokens, stream(source, tokenizer)) and not skipped
    header = read_header(path)
    assert (header.documents, header.lines) == (300, 300)
    assert header.source_bytes == os.path.getsize(source)
    assert path.stat().st_size == HEADER + 2 * len(tokens)


def test_large_vocabularies_take_four_bytes(source, tokenizer, monkeypatch):
    monkeypatch.setattr(Tokenizer, "vocab_size", 2**16 + 1)
    tokens, _ = open_tokens(prepare(source, tokenizer), tokenizer)
    assert tokens.dtype == np.uint32 and np.array_equal(tokens, stream(source, tokenizer))


def test_a_fresh_file_is_kept_and_a_stale_one_made_again(source, tokenizer, capsys):
    path = prepare(source, tokenizer)
    made = path.stat().st_mtime_ns
    os.utime(source)  # touched, not changed
    prepare(source, tokenizer)
    assert path.stat().st_mtime_ns == made
    content = Path(source).read_bytes()
    Path(source).write_bytes(content.replace(b"baker", b"taker", 1))  # of the same length
    prepare(source, tokenizer)
    assert np.array_equal(open_tokens(path, tokenizer)[0], stream(source, tokenizer))
    other = Tokenizer.train([row["text"] for row in texts()], 300)
    prepare(source, other)
    assert np.array_equal(open_tokens(path, other)[0], stream(source, other))
    path.write_bytes(b"{}")
    prepare(source, tokenizer)
    said = capsys.readouterr().out
    assert re.findall("is not there yet|its source changed|another tokenizer|is no token file", said) == [
        "is not there yet", "its source changed", "another tokenizer", "is no token file"]  # fmt: skip


def test_a_token_file_of_another_tokenizer_or_cut_off_is_refused(source, tokenizer):
    path = prepare(source, tokenizer)
    with pytest.raises(UserError, match=r"text\.tokens was made with another tokenizer"):
        read_tokens(path, Tokenizer.train(["a b"], 300))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is cut off"):
        read_tokens(path, tokenizer)
    with pytest.raises(UserError, match="There is no data file"):
        prepare(str(path.parent / "none.jsonl"), tokenizer)
    content = Path(source).read_bytes()
    with pytest.raises(UserError, match=r"text\.jsonl is the source itself"):
        prepare(source, tokenizer, path.parent / ".." / path.parent.name / "text.jsonl")
    assert Path(source).read_bytes() == content
    (path.parent / "e.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"e\.jsonl is empty"):
        prepare(path.parent / "e.jsonl", tokenizer)


def test_many_processes_hash_the_source_at_once(source, tokenizer, monkeypatch):
    prepare(source, tokenizer)
    lock = FileLock(Path(source).with_suffix(".tokens.lock"))

    def hash_of_file(path):
        with lock.acquire(timeout=0):  # Timeout if the lock is held meanwhile
            return fingerprint(path)

    monkeypatch.setattr(corpus, "fingerprint", hash_of_file)
    prepare(source, tokenizer)


KILLED = """
import os, signal, sys
from minimind import Tokenizer, corpus
corpus.PART = 400
parts, write = 0, corpus.Header.write
def dying(header, file):
    global parts
    parts += 1
    if parts == int(sys.argv[3]):
        file.write(b"half a part" * 9999)  # ids that no header speaks of
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(header, file)
corpus.Header.write = dying
corpus.prepare(sys.argv[1], Tokenizer.load(sys.argv[2]))
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    source, tokenizer, tmp_path, monkeypatch
):
    whole = prepare(source, tokenizer, tmp_path / "whole.tokens").read_bytes()
    command = [sys.executable, "-c", KILLED, source, data_samples("tokenizer.json"), "5"]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    partial = tmp_path / "text.tokens.partial"
    assert 0 < read_header(partial).lines < 300 and not (tmp_path / "text.tokens").exists()
    encoded = []
    encode = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, t: encoded.extend(t) or encode(self, t))
    before = read_header(partial).documents
    assert prepare(source, tokenizer).read_bytes() == whole
    assert len(encoded) == 300 - before and not partial.exists()


def test_an_unfinished_file_of_a_changed_source_is_begun_anew(
    source, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(corpus, "PART", 400)
    lines = Path(source).read_text(encoding="utf-8").splitlines(keepends=True)
    broken = [*lines[:100], "{\n", *lines[101:]]
    (tmp_path / "text.jsonl").write_text("".join(broken), encoding="utf-8")
    with pytest.raises(UserError, match=r"text\.jsonl, line 101: not JSON"):
        prepare(source, tokenizer)
    (tmp_path / "text.jsonl").write_text("".join(lines), encoding="utf-8")  # mended: goes on
    assert read_header(tmp_path / "text.tokens.partial").lines > 50
    lines[0] = lines[1]
    (tmp_path / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    assert np.array_equal(
        open_tokens(prepare(source, tokenizer), tokenizer)[0], stream(source, tokenizer)
    )


def test_pieces_have_the_ids_of_whole_texts(tokenizer):
    """Whatever stands beside a cut: spaces of all kinds, digits, contractions, tags, half tags."""
    rng = random.Random(0)
    parts = ["a", "Quin", "it's", " ", " ", "  ", "\n", "\t", "\u3000", "\x1c", "\u00a0", "\r", "7", "42", "²", "，",
             "中文", "!", "...", "<think>", "</answer>", "<|im_end|>", "<", "é", "e\u0301", "🙂", "'", "'ll", "_"]  # fmt: skip
    documents = ["".join(rng.choices(parts, k=rng.randint(0, 14))) for _ in range(4000)]
    spacious = Tokenizer.train(documents, 500)  # runs of spaces are tokens of it
    assert any(not token.strip("Ġ") and len(token) > 1 for token in spacious.vocabulary)
    for each in (tokenizer, spacious):
        assert each.ends_words_at_spaces
        encode = Encoder(each, "uint16")
        for _ in range(2):  # the second time from what is known
            ids = [np.frombuffer(encode([text]), np.uint16).tolist() for text in documents]
            assert ids == [[*each.encode(text), each.pad_id] for text in documents]


def test_other_tokenizers_get_whole_texts(tokenizer):
    content = json.loads(tokenizer.to_json())
    tag = {**content["added_tokens"][3], "lstrip": True}
    for change in (
        {"normalizer": {"type": "NFC"}},
        {
            "pre_tokenizer": {
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": "always",
                "split": False,
            }
        },
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            }
        },
        {"pre_tokenizer": None},
        {"added_tokens": [*content["added_tokens"][:3], tag, *content["added_tokens"][4:]]},
    ):
        other = Tokenizer.from_json(json.dumps({**content, **change}))
        assert not other.ends_words_at_spaces, change
        ids = np.frombuffer(Encoder(other, "uint16")(["Quin is a b", "c"]), np.uint16).tolist()
        assert ids == [*other.encode("Quin is a b"), 0, *other.encode("c"), 0]


# The command, and training from it


def test_the_command_trains_a_tokenizer_where_none_is_given(source, tmp_path):
    cli.dispatch(["prepare", "--data_path", source])
    tokenizer = Tokenizer.load(tmp_path / "text.tokenizer.json")
    tokens, _ = open_tokens(tmp_path / "text.tokens", tokenizer)
    assert np.array_equal(tokens, stream(source, tokenizer))
    made = (tmp_path / "text.tokenizer.json").stat().st_mtime_ns
    cli.dispatch(["prepare", "--data_path", source, "--to", str(tmp_path / "b.tokens")])
    assert (tmp_path / "text.tokenizer.json").stat().st_mtime_ns == made
    assert (tmp_path / "b.tokens").read_bytes() == (tmp_path / "text.tokens").read_bytes()


def test_training_and_the_command_agree_on_the_tokenizer(source, tmp_path, monkeypatch):
    cli.dispatch(["prepare", "--data_path", source])
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("text.*")}
    settings = {**SMALL, "epochs": 0.1, "out_dir": str(tmp_path / "out")}
    for data_path in (source, str(tmp_path / "text.tokens")):
        result = minimind.train("pretrain", data_path=data_path, **settings)
        assert result.tokenizer.to_json() + "\n" == (tmp_path / "text.tokenizer.json").read_text()
    assert made == {path: path.stat().st_mtime_ns for path in made}
    with pytest.raises(UserError, match=r"no tokenizer at .*b\.tokenizer\.json"):
        corpus.own_tokenizer(tmp_path / "b.tokens")


def test_a_tokenizer_is_trained_again_when_its_source_has_changed(source, tmp_path, capsys):
    first = corpus.own_tokenizer(source).to_json()
    write_lines(tmp_path / "text.jsonl", [{"text": "quite other words stand here"}] * 9)
    second = corpus.own_tokenizer(source).to_json()
    assert second != first == corpus.own_tokenizer(write_lines(tmp_path / "text.jsonl", texts(300))).to_json()  # fmt: skip
    assert capsys.readouterr().out.count("was made before its source changed") == 2
    (tmp_path / "text.tokenizer.sha256").unlink()  # somebody's own, then
    write_lines(tmp_path / "text.jsonl", [{"text": "quite other words stand here"}] * 9)
    assert corpus.own_tokenizer(source).to_json() == first


def test_a_tokenizer_sees_a_bounded_sample_of_the_source(source, monkeypatch):
    seen = []
    monkeypatch.setattr(Tokenizer, "train", lambda texts, size: seen.extend(texts))
    monkeypatch.setattr(corpus, "SAMPLE", os.path.getsize(source) // 10)
    corpus.train_tokenizer(source)
    assert len(seen) == 30 and seen[1] == texts(300)[10]["text"]


def test_training_prepares_by_itself_and_gives_the_same_losses(source, tmp_path, monkeypatch):
    settings = {
        **SMALL,
        "data_path": source,
        "accumulation_steps": 1,
        "epochs": 0.2,
        "preset": "tiny",
    }

    def losses(name, **more):
        result = minimind.train(
            "pretrain",
            **{**settings, "eval_data_path": source, "out_dir": str(tmp_path / name), **more},
        )
        return [(row["loss"], row["grad_norm"]) for row in result.history]

    in_memory = losses("a")
    assert not (tmp_path / "text.tokens").exists(), "a small source leaves no file"
    monkeypatch.setattr(corpus, "SMALL", 0)
    assert losses("b") == in_memory and (tmp_path / "text.tokens").exists()
    monkeypatch.setattr(corpus, "write_tokens", None)  # it is fresh
    assert losses("c") == losses("d", data_path=str(tmp_path / "text.tokens")) == in_memory


# Rows read when they are asked for


def test_rows_come_from_the_file_and_only_when_asked_for(tmp_path, tokenizer):
    path = write_lines(tmp_path / "c.jsonl", chats(40))
    rows = read_chats(path, tokenizer, 32)
    whole = [encode_chat_row(tokenizer, row, 32) for row in chats(40)]
    assert list(rows) == whole and rows[-1] == whole[-1]
    some = rows[3:30:5]
    assert list(some) == whole[3:30:5] and some.lengths.tolist() == rows.lengths[3:30:5].tolist()
    assert list(rows[[7, 2]]) == [whole[7], whole[2]]
    assert rows.lengths.tolist() == [len(example["input_ids"]) for example in whole]
    held = {name: value for name, value in vars(rows).items() if not callable(value)}
    assert held.keys() == {"path", "offsets", "lengths", "faults", "sha256", "columns"}
    with pytest.raises(IndexError):
        rows[40]


def test_the_index_of_a_large_file_is_kept_beside_it(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(corpus, "SMALL", 0)
    path = write_lines(tmp_path / "c.jsonl", chats(40))
    calls = []
    monkeypatch.setattr(corpus, "index_rows", lambda *a: calls.append(1) or index_rows(*a))
    first = read_chats(path, tokenizer, 32)
    again = read_chats(path, tokenizer, 32)
    assert len(calls) == 1 and list(first) == list(again) and first.faults == again.faults
    read_chats(path, tokenizer, 16)  # other lengths
    read_chats(path, Tokenizer.train(["na say yes"], 300), 16)  # other tokens
    whole = list(first)
    write_lines(tmp_path / "c.jsonl", chats(40, seed=1))  # other rows
    assert list(read_chats(path, tokenizer, 32)) != whole and len(calls) == 4
    with pytest.raises(UserError, match=r"c\.jsonl has changed"):
        list(first)
    (tmp_path / "c.chat.index.npz").write_bytes(b"damaged")
    assert len(read_chats(path, tokenizer, 16)) == 40 and len(calls) == 5


def test_rows_are_looked_at_by_several_threads_and_stay_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    path, together = write_lines(tmp_path / "c.jsonl", chats(40)), threading.Barrier(2, timeout=20)

    def look(row):
        together.wait()  # fails unless another row is looked at at the same time
        text = row["conversations"][0]["content"]
        return len(text), "short" if len(text) < 20 else None

    wanted = [len(row["conversations"][0]["content"]) for row in chats(40)]
    _, lengths, faults = index_rows(Path(path), check_conversation, look, False)
    assert lengths.tolist() == wanted and faults["short"] == sum(n < 20 for n in wanted) > 0


def test_an_index_takes_few_bytes_a_row(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", chats(50))
    offsets, lengths, _ = index_rows(
        tmp_path / "c.jsonl", check_conversation, lambda row: (7, None), False
    )
    assert offsets.nbytes + lengths.nbytes == 12 * 50
    lines = Path(path).read_bytes()
    assert all(lines[start : start + 16] == b'{"conversations"' for start in offsets)
