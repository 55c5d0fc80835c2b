import numpy as np
import pytest
from helpers import chats, texts, write_lines

from minimind import UserError
from minimind.config import data_samples, stage_config
from minimind.data import (
    Batches,
    PackedTokens,
    batch_order,
    check_conversation,
    check_text,
    pack,
    pad_batch,
    read_jsonl,
    useful_share,
)
from minimind.stages import STAGES


def user(content):
    return {"role": "user", "content": content}


BAD_TEXT = {
    "not JSON": b'{"text": "a"', "no field": b'{"txt": "a"}', "not a string": b'{"text": 3}',
    "not an object": b'["text"]', "empty": b'{"text": "  "}', "not UTF-8": b'{"text": "\xff\xfe"}',
}  # fmt: skip


@pytest.mark.parametrize("line", BAD_TEXT.values(), ids=BAD_TEXT)
def test_a_bad_text_row_is_named_with_file_and_line(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 3: "):
        read_jsonl(path, check_text)


BAD_CHATS = {
    "no field": ({"messages": []}, "conversations"),
    "empty": ({"conversations": []}, "conversations"),
    "no content": ({"conversations": [{"role": "user"}]}, "message 1"),
    "unknown role": ({"conversations": [user("a"), {"role": "robot", "content": "b"}]}, "message 2 has the role 'robot'"),
    "no assistant": ({"conversations": [user("a")]}, "assistant"),
}  # fmt: skip


@pytest.mark.parametrize("row, words", BAD_CHATS.values(), ids=BAD_CHATS)
def test_a_bad_chat_row_is_named_with_its_fault(row, words, tmp_path):
    path = write_lines(tmp_path / "chat.jsonl", [*chats(2), row])
    with pytest.raises(UserError, match=r"chat\.jsonl, line 3: .*" + words):
        read_jsonl(path, check_conversation)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="no data file"):
        read_jsonl(tmp_path / "none.jsonl", check_text)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="is empty"):
        read_jsonl(tmp_path / "empty.jsonl", check_text)


def test_packing_predicts_every_token_once_and_wastes_nothing(tokenizer):
    documents = [row["text"] for row in texts(40)]
    packed = pack(documents, tokenizer, block=16)
    stream = [i for text in documents for i in [*tokenizer.encode(text), tokenizer.pad_id]]
    assert packed.tokens.tolist() == stream
    predicted = [label for block in packed for label in block["labels"][1:]]
    assert predicted == stream[1 : 1 + len(predicted)]
    assert len(stream) - 1 - len(predicted) < 15
    assert all(len(block["input_ids"]) == 16 for block in packed)


def test_a_text_shorter_than_a_block_is_refused(tmp_path, tokenizer):
    path = write_lines(tmp_path / "short.jsonl", [{"text": "too short"}])
    config = stage_config("pretrain", data_path=path, max_seq_len=64)
    with pytest.raises(UserError, match="max_seq_len=64"):
        STAGES["pretrain"](config, None, tokenizer)


def test_useful_tokens_of_the_course(tokenizer):
    pretrain = stage_config("pretrain", "course")
    assert (
        pretrain.max_seq_len - 1
    ) / pretrain.max_seq_len >= 0.99  # labels per position; no padding
    sft = stage_config("sft", "course")
    lengths = STAGES["sft"](sft, None, tokenizer).lengths
    bucketed = useful_share(lengths, batch_order(lengths, sft.batch_size, seed=1))
    shuffled = np.random.default_rng(1).permutation(len(lengths))
    plain = [
        shuffled[i : i + sft.batch_size].tolist() for i in range(0, len(lengths), sft.batch_size)
    ]
    assert bucketed >= 0.9 > useful_share(lengths, plain)


def test_every_row_is_in_exactly_one_batch():
    lengths = np.random.default_rng(0).integers(1, 90, 1003).tolist()
    order = batch_order(lengths, 16, seed=3)
    assert sorted(i for batch in order for i in batch) == list(range(1003))
    assert order == batch_order(lengths, 16, seed=3) != batch_order(lengths, 16, seed=4)


def test_the_stream_can_be_sought():
    packed = PackedTokens(np.arange(200, dtype=np.int32), block=5)

    def stream():
        return Batches(
            packed, 8, 1, lambda rows: [r["input_ids"][0] for r in rows], [5] * len(packed)
        )

    forward = stream()
    read = [forward[m] for m in range(18)]
    assert [stream()[m] for m in (17, 3, 9)] == [read[17], read[3], read[9]]
    first, second = ([start for batch in read[e : e + 7] for start in batch] for e in (0, 7))
    assert sorted(first) == sorted(second) and first != second


def test_padding_is_never_a_label():
    batch = pad_batch(
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}], 0
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_built_in_data_pass_their_own_checks():
    for name, check in (("pretrain", check_text), ("sft", check_conversation)):
        assert len(read_jsonl(data_samples(f"{name}.jsonl"), check)) > 1000
