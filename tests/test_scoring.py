"""Scores on the user's own files, against sums done by hand."""

import math

import pytest
import torch
from helpers import write_lines

from minimind import UserError
from minimind.scoring import (
    Question,
    Score,
    bits_per_byte_of,
    choice_logps,
    perplexity_of,
    read_questions,
    read_text,
    score_choices,
    text_nats,
    wilson,
)

TEXT = "The otter of Quin is 12, 你好. " * 7


@torch.no_grad()
def test_a_text_is_scored_in_windows_that_see_themselves_only(small_model, tokenizer):
    model = small_model(vocab_size=tokenizer.vocab_size)
    ids = [tokenizer.pad_id, *tokenizer.encode(TEXT)]
    (nats, there), expected = text_nats(model, tokenizer, TEXT, 10), []
    for start in range(0, len(ids) - 1, 10):
        window = torch.tensor(ids[start : start + 11])[None]
        logps = model(window[:, :-1]).log_softmax(-1)[0]
        expected += [-float(logps[t, i]) for t, i in enumerate(window[0, 1:])]
    assert len(expected) == len(ids) - 1 and int(there.sum()) == len(expected)
    torch.testing.assert_close(nats[there], torch.tensor(expected), atol=1e-4, rtol=0)
    assert bits_per_byte_of(nats, TEXT) == pytest.approx(
        sum(expected) / math.log(2) / len(TEXT.encode())
    )
    assert perplexity_of(nats, there) == pytest.approx(
        math.exp(sum(expected) / len(expected)), rel=1e-4
    )


@pytest.mark.parametrize("as_chat", [False, True])
@torch.no_grad()
def test_a_choice_is_scored_by_its_own_tokens(as_chat, small_model, tokenizer):
    model = small_model(vocab_size=tokenizer.vocab_size)
    questions = [
        Question("The pet of Quin is", ["an otter.", "a", "12"], 0),
        Question("你", ["好", "x y z"], 1),
    ]
    found = choice_logps(model, tokenizer, questions, as_chat)
    for question, values in zip(questions, found, strict=True):
        for choice, value in zip(question.choices, values, strict=True):
            turns = [{"role": "user", "content": question.question}]
            prompt = tokenizer.encode_chat(turns, add_generation_prompt=True)
            answer = [*tokenizer.encode(choice), tokenizer.eos_id]
            if not as_chat:
                prompt = [tokenizer.pad_id, *tokenizer.encode(question.question)]
                answer = tokenizer.encode(" " + choice)
            logps = model(torch.tensor([prompt + answer])).log_softmax(-1)[0]
            by_hand = sum(
                float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(answer)
            )
            assert value == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_a_broken_model_has_no_score(damage, small_model, tokenizer):
    model = small_model(vocab_size=tokenizer.vocab_size)
    model.model.norm.weight.data[3] = damage
    with pytest.raises(UserError, match="not finite"):
        text_nats(model, tokenizer, TEXT, 10)
    with pytest.raises(UserError, match="not finite"):
        choice_logps(model, tokenizer, [Question("a", ["b", "c"], 0)])


def test_per_byte_keeps_short_choices_from_winning_by_their_length():
    questions = [Question("?", ["ab", "abcdefgh"], 1), Question("?", ["a", "b", "c", "d"], 2)]
    logps = [[-3.0, -4.0], [-1.0, -2.0, -3.0, -4.0]]
    assert score_choices(questions, logps, per_byte=False).right == 0
    score = score_choices(questions, logps, per_byte=True)
    assert (score.right, score.questions, score.chance) == (1, 2, 0.375)


def test_a_window_holds_a_token(small_model, tokenizer):
    with pytest.raises(UserError, match="length=-5"):
        text_nats(small_model(vocab_size=tokenizer.vocab_size), tokenizer, TEXT, -5)


def test_wilsons_interval():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)  # published values
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert Score(30, 100, 0.25).verdict == "at chance"
    assert Score(60, 100, 0.25).verdict == "above chance"
    assert Score(5, 100, 0.25).verdict == "below chance"


def test_questions_in_several_spellings(tmp_path):
    rows = [{"question": "a", "choices": ["x", "y"], "answer": 1}, {"question": "a", "choices": ["x", "y"], "answer": "B"},
            {"question": "a", "A": "x", "B": "y", "answer": "b"}, {"question": "a", "choices": ["x", "y"], "answer": "y"},
            {"question": "a", "choices": ["B", "A"], "answer": "A"}]  # fmt: skip
    questions = read_questions(write_lines(tmp_path / "q.jsonl", rows))
    assert [q.answer for q in questions] == [1, 1, 1, 1, 1]
    assert questions[2].choices == ["x", "y"]


@pytest.mark.parametrize(
    "row, words",
    [({"choices": ["a", "b"], "answer": 0}, 'needs a field "question"'), ({"question": "a", "answer": 0}, "at least two"),
     ({"question": "a", "choices": ["a", ""], "answer": 0}, "at least two"), ({"question": "a", "choices": ["a", "b"], "answer": 2}, '"answer" is 2'),
     ({"question": "a", "choices": ["a", "b"], "answer": "C"}, "\"answer\" is 'C'"), ({"question": "a", "choices": ["a", "b"]}, '"answer" is None'),
     ({"question": "a", "choices": ["a", "b"], "answer": True}, '"answer" is True')],
)  # fmt: skip
def test_rows_that_are_no_question(row, words, tmp_path):
    path = write_lines(
        tmp_path / "q.jsonl", [{"question": "a", "choices": ["x", "y"], "answer": 0}, row]
    )
    with pytest.raises(UserError) as error:
        read_questions(path)
    assert words in str(error.value) and "q.jsonl, line 2" in str(error.value)


def test_texts_that_cannot_be_read(tmp_path):
    for content, words in (
        (b"", "is empty"),
        (b"ab\xff", "byte 3 is not UTF-8"),
        (None, "cannot be read"),
    ):
        (tmp_path / "t.txt").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "t.txt").write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_text(tmp_path / "t.txt")
