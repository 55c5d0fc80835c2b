"""200 malformed rows of every kind among good ones: found, named, counted, and skipped when asked to."""

import json
import random
import re
from collections import Counter

import pytest
from helpers import SMALL, chats, texts

import minimind
from minimind import UserError, corpus
from minimind.corpus import open_tokens, prepare
from minimind.data import check_conversation, check_text, read_jsonl, scan_jsonl
from minimind.stages.dpo import check_pair
from minimind.stages.reason import check_reasoning
from minimind.stages.rl import check_problem
from minimind.stages.sft import read_chats


def spoiled(good, rng):
    """Ways to spoil any row, as (kind, line)."""
    text = json.dumps(good, ensure_ascii=False)
    line, field = text.encode(), next(iter(good))
    return [
        ("not JSON", line[: rng.randrange(1, len(line) - 1)]),
        ("not JSON", b"\x00" * rng.randrange(1, 50)),
        ("not JSON", line.replace(b" ", b"\x00 ", 1)[:-1]),
        ("not JSON", line + line),
        ("not JSON", b"\xef\xbb\xbf" + line),
        ("not JSON", b"[" * 200_000),
        ("not JSON", b'{"text": ' + b"9" * 5000 + b"}"),
        ("not JSON", b"x" * 3_000_000),
        ("byte … is not UTF-8", line[:3] + b"\xff\xfe" + line[3:]),
        ("holds half a character", line[:-1] + rb', "more": "\ud83d"}'),
        ("has a field twice", line[:-1] + f', "{field}": 1}}'.encode()),
        ("is not a JSON object", rng.choice([b"[]", b'"text"', b"3", b"null", b"true"])),
    ]


def faults_of_text(good, rng):
    field = 'needs a field "text" with a string'
    wrong = [{}, {"txt": "a"}, {"text": None}, {"text": ["a"]}, {"text": 3}, {"Text": "a"}]
    empty = [{"text": ""}, {"text": " "}, {"text": "\n\t"}]
    return [*((field, row) for row in wrong), *(('"text" is empty', row) for row in empty)]


def faults_of_chat(good, rng):
    user, answer, *_ = good["conversations"]
    wrong = [{}, "hi", None, {"role": "assistant"}, {"role": "assistant", "content": None},
             {"role": "assistant", "content": ["a"]}, {"from": "gpt", "value": "a"}]  # fmt: skip
    roles = [{**user, "role": role} for role in ("robot", "human", "")]
    no_field = 'needs a field "conversations" with a list of messages'
    silent = "no message has the role …, so there is nothing to learn"
    return [
        *((no_field, row) for row in ({}, {"conversations": []}, {"conversations": "hello"})),
        *(('message … needs "role" and "content", both strings', {"conversations": [user, m]}) for m in wrong),
        *(("message … has the role …", {"conversations": [m, answer]}) for m in roles),
        (silent, {"conversations": [user, user]}),
    ]  # fmt: skip


def faults_of_pair(good, rng):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    other = [{**chat[0], "content": "c"}, chat[1]]
    return [
        ('"chosen" is missing or empty', {**good, "chosen": rng.choice(["", None, []])}),
        ('"rejected" is missing or empty', {"prompt": "a", "chosen": "b"}),
        ('needs "prompt" with the question, since the answers are strings', {**good, "prompt": " "}),
        ("chosen and rejected are equal: there is no preference to learn", {**good, "rejected": good["chosen"]}),
        ('the answer of "chosen" is empty', {**good, "chosen": " "}),
        ("the two sides answer different prompts", {"chosen": chat, "rejected": other}),
        ('"chosen": no message has the role …, so there is nothing to learn', {"chosen": chat[:1], "rejected": chat}),
        ('"chosen": needs a field "conversations" with a list of messages', {"chosen": 5, "rejected": "a"}),
    ]  # fmt: skip


def faults_of_thought(good, rng):
    user, answer = good["conversations"]
    text = answer["content"]
    forms = [("message … has <think> … times instead of once", "4"),
             ("message … has </answer> … times instead of once", text.removesuffix("</answer>")),
             ("message … has text outside the tags", "So: " + text),
             ("message … has an empty answer", "<think>a</think><answer> </answer>"),
             ("message … has its tags in the order <answer> </answer> <think> </think>",
              "<answer>4</answer><think>a</think>")]  # fmt: skip
    rows = [(kind, {"conversations": [user, {**answer, "content": said}]}) for kind, said in forms]
    return [*faults_of_chat(good, rng)[:4], *rows]


def faults_of_problem(good, rng):
    user, empty = good["conversations"]
    said = {**empty, "content": "It is 4."}
    last = "its last turn must be an empty assistant turn after a question, for the model to write"
    return [
        *faults_of_chat(good, rng)[:4],
        *((last, {"conversations": turns}) for turns in ([user, said], [empty], [user, empty, user])),
        *(('"answer" must be a string', {**good, "answer": answer}) for answer in (4, "", None)),
    ]  # fmt: skip


def pairs(count):
    return [{"prompt": f"question {i}", "chosen": "yes " * (i % 5 + 1), "rejected": "no " * (i % 4 + 1)}
            for i in range(count)]  # fmt: skip


def thoughts(count):
    return [{"conversations": [{"role": "user", "content": f"{i}+1?"}, {
        "role": "assistant", "content": f"<think>{i}+1={i + 1}</think><answer>{i + 1}</answer>"}]}
        for i in range(count)]  # fmt: skip


def problems(count):
    return [{"conversations": [{"role": "user", "content": f"{i}+1?"}, {"role": "assistant", "content": ""}],
             "answer": str(i + 1)} for i in range(count)]  # fmt: skip


KINDS = {
    "pretrain": (texts, check_text, faults_of_text),
    "sft": (chats, check_conversation, faults_of_chat),
    "dpo": (pairs, check_pair, faults_of_pair),
    "reason": (thoughts, check_reasoning, faults_of_thought),
    "grpo": (problems, check_problem, faults_of_problem),
}


def mixed(stage, path, count=200):
    """Write 120 good rows with bad ones of every kind among them; return those, and number to kind."""
    rng = random.Random(0)
    make, _, faults = KINDS[stage]
    good = make(120)
    ways = [
        *spoiled(good[0], rng),
        *((kind, json.dumps(row).encode()) for kind, row in faults(good[0], rng)),
    ]
    short = [way for way in ways if len(way[1]) < 9999]
    rows = [(None, json.dumps(row).encode()) for row in good]
    rows += ways + [rng.choice(short) for _ in range(count - len(ways))]
    rng.shuffle(rows)
    path.write_bytes(b"\n".join(line for _, line in rows))
    return good, {number: kind for number, (kind, _) in enumerate(rows, start=1) if kind}


def refusal(bad):
    """What the first bad row is refused with."""
    return rf"mixed\.jsonl, line {next(iter(bad))}: "


@pytest.mark.parametrize("stage", KINDS)
def test_every_bad_row_is_found_named_and_counted_by_kind(stage, tmp_path, capsys):
    path, skipped = tmp_path / "mixed.jsonl", Counter()
    good, bad = mixed(stage, path)
    kept = [json.dumps(row) for _, row in scan_jsonl(path, KINDS[stage][1], skipped)]
    assert sorted(kept) == sorted(map(json.dumps, good))
    assert len(bad) == 200
    assert skipped == Counter(f"bad row left out: {kind}" for kind in bad.values())
    said = capsys.readouterr().out
    named = re.findall(r"^Left out: \S+mixed\.jsonl, line (\d+): ", said, re.M)
    assert [int(number) for number in named] == list(bad)
    assert max(map(len, said.splitlines())) < 900
    with pytest.raises(UserError, match=refusal(bad)):
        read_jsonl(path, KINDS[stage][1])


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_training_skips_them_only_when_told_to_and_reports_how_many(stage, tmp_path):
    _, bad = mixed(stage, tmp_path / "mixed.jsonl")
    settings = {**SMALL, "preset": "tiny", "from_weight": "none", "epochs": 0.05, "eval_data_path": "",
                "data_path": str(tmp_path / "mixed.jsonl"), "out_dir": str(tmp_path / "out")}  # fmt: skip
    with pytest.raises(UserError, match=refusal(bad)):
        minimind.train(stage, **settings)
    metrics = minimind.train(stage, skip_bad_rows=1, **settings).metrics
    assert sum(n for fault, n in metrics.items() if fault.startswith("bad row left out: ")) == 200


def test_a_token_file_remembers_what_it_leaves_out(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(corpus, "PART", 2000)
    good, bad = mixed("pretrain", tmp_path / "mixed.jsonl")
    for _ in range(2):  # made, then found fresh
        to = prepare(tmp_path / "mixed.jsonl", tokenizer, skip_bad_rows=True)
        tokens, skipped = open_tokens(to, tokenizer)
        assert sum(skipped.values()) == 200
        assert (tokens == tokenizer.pad_id).sum() == len(good)
    with pytest.raises(UserError, match=refusal(bad)):
        prepare(tmp_path / "mixed.jsonl", tokenizer)


def test_an_index_remembers_what_it_leaves_out(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(corpus, "SMALL", 0)
    good, bad = mixed("sft", tmp_path / "mixed.jsonl")
    for _ in range(2):
        rows = read_chats(tmp_path / "mixed.jsonl", tokenizer, 32, skip_bad_rows=1)
        assert len(rows) == len(good) and sum(rows.faults.values()) == 200
    with pytest.raises(UserError, match=refusal(bad)):
        read_chats(tmp_path / "mixed.jsonl", tokenizer, 32)


def test_a_file_of_bad_rows_alone_is_no_data(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"txt": "a"}\n' * 3)
    with pytest.raises(UserError, match=r"bad\.jsonl is empty: no good row"):
        list(scan_jsonl(tmp_path / "bad.jsonl", check_text, Counter()))
