import numpy as np
import pytest

from minimind import UserError
from minimind.baselines import NGram, nearest_answers, text_baselines


def test_probabilities_of_all_next_tokens_sum_to_one():
    rng = np.random.default_rng(0)
    model = NGram(rng.integers(0, 6, 400), vocab_size=6, order=3)
    for context in ([1, 2], [5, 5], [0, 3]):
        total = sum(np.exp(model.log_probs(np.array([*context, token]))[-1]) for token in range(6))
        assert total == pytest.approx(1)


def test_a_bigram_by_hand():
    """Kneser-Ney on a b a b a c: n(a, b) = 2, n(a, c) = 1; b, c and a follow one token each... twice for a."""
    a, b, c = 0, 1, 2
    model = NGram(np.array([a, b, a, b, a, c]), vocab_size=3, order=2)
    once, twice = 1, 2  # bigrams: ac once; ab, ba twice
    discount = once / (once + 2 * twice)
    lower_once = 3  # each of a, b, c is preceded by one kind of token
    lower_discount = lower_once / lower_once
    lower = (1 - lower_discount) / 3 + lower_discount * 3 / 3 / 3
    expected = (2 - discount) / 3 + discount * 2 / 3 * lower
    assert np.exp(model.log_probs(np.array([a, b]))[0]) == pytest.approx(expected)


def test_more_context_predicts_better_where_there_is_structure(tokenizer):
    train = [f"The job of {n} is {j}." for n, j in zip("ABCDEFGH", "pqrstuvw", strict=True)] * 20
    scores = text_baselines(train, train[:8], tokenizer)
    assert scores["5-gram"] < 0.5 * scores["unigram"]


def test_too_large_a_vocabulary_is_refused():
    with pytest.raises(UserError, match="64 bits"):
        NGram(np.arange(10), vocab_size=10_000)


def test_nearest_answer(tokenizer):
    pairs = [("What is the job of Ann?", "baker"), ("Tell me the pet of Bob.", "otter")]
    assert nearest_answers(pairs, ["Tell me the pet of Ann."], tokenizer) == ["otter"]
