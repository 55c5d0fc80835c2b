"""What a model must beat: n-gram models and gzip, measured on the same held-out text."""

from __future__ import annotations

import gzip
from collections.abc import Sequence

import numpy as np

from minimind.errors import UserError
from minimind.tokenizer import Tokenizer


class NGram:
    """Interpolated Kneser-Ney n-gram model over tokens (Kneser & Ney 1995; Chen & Goodman 1999).

    p_k(w | c) = (max(n(c, w) - D, 0) + D·types(c)·p_{k-1}(w | c without its first)) / n(c)

    where below the highest order n counts in how many different contexts the k-gram was seen. The
    discount D of each order is n₁/(n₁ + 2·n₂), from the numbers of k-grams seen once and twice.

    Args:
        tokens: (N,) training token ids.
        vocab_size: V; V to the power of `order` must fit 64 bits (V up to 7131 at order 5).
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int, order: int = 5) -> None:
        if vocab_size**order >= 2**64:
            raise UserError(
                f"A {order}-gram over {vocab_size} tokens needs more than 64 bits. Lower the order."
            )
        self.vocab_size, self.order = vocab_size, order
        self.levels: list[tuple[np.ndarray, ...]] = []
        keys, counts = np.unique(self._keys(tokens, order), return_counts=True)
        for k in range(order, 0, -1):
            self.levels.insert(0, self._level(keys, counts))
            if k > 1:  # drop the first token: how many different tokens precede each shorter gram?
                suffix = keys % np.uint64(vocab_size ** (k - 1))
                keys, counts = np.unique(suffix, return_counts=True)

    def _keys(self, tokens: np.ndarray, k: int) -> np.ndarray:
        """Return every run of k tokens as one number in base V: (N-k+1,)."""
        radix, tokens = np.uint64(self.vocab_size), tokens.astype(np.uint64)
        keys = np.zeros(len(tokens) - k + 1, np.uint64)
        for i in range(k):
            keys = keys * radix + tokens[i : len(tokens) - k + 1 + i]
        return keys

    def _level(self, keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, ...]:
        contexts, first = np.unique(keys // np.uint64(self.vocab_size), return_index=True)
        totals = np.add.reduceat(counts, first)
        types = np.diff(np.append(first, len(keys)))
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        return keys, counts, contexts, totals, types, once / max(once + 2 * twice, 1)

    def log_probs(self, tokens: np.ndarray) -> np.ndarray:
        """Return ln p of each token of a document (N,) after the ones before it, (N-1,).

        The first token is context only (give the end-of-text token there).
        """
        padded = np.concatenate([np.repeat(tokens[:1], self.order - 1), tokens[1:]])
        probability = np.full(len(tokens) - 1, 1 / self.vocab_size)
        for k, (keys, counts, contexts, totals, types, discount) in enumerate(self.levels, start=1):
            grams = self._keys(padded, k)[self.order - k :]
            count = _look_up(grams, keys, counts)
            context = grams // np.uint64(self.vocab_size)
            total, kinds = _look_up(context, contexts, totals), _look_up(context, contexts, types)
            backed_off = np.maximum(count - discount, 0) + discount * kinds * probability
            probability = np.where(total > 0, backed_off / np.maximum(total, 1), probability)
        return np.log(probability)


def _look_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the value of each wanted key in a sorted table, 0 where there is none."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def text_baselines(
    train: Sequence[str], heldout: Sequence[str], tokenizer: Tokenizer
) -> dict[str, float]:
    """Return the bits per byte of held-out text under a unigram, a 5-gram and gzip."""
    end = [tokenizer.pad_id]
    stream = np.concatenate([np.array(end + ids) for ids in tokenizer.encode_batch(train)])
    documents = [np.array(end + ids + end) for ids in tokenizer.encode_batch(heldout)]
    size = sum(len(text.encode()) for text in heldout)
    scores = {}
    for name, order in (("unigram", 1), ("5-gram", 5)):
        model = NGram(stream, tokenizer.vocab_size, order)
        nats = -sum(model.log_probs(document).sum() for document in documents)
        scores[name] = float(nats / np.log(2) / size)
    scores["gzip"] = 8 * len(gzip.compress("\n".join(heldout).encode(), 9)) / size
    return scores


def nearest_answers(
    train: Sequence[tuple[str, str]], questions: Sequence[str], tokenizer: Tokenizer
) -> list[str]:
    """Answer each question with the answer to the most similar training question.

    Similar: the largest share of common tokens (Jaccard). It is what a lookup table can do.
    """
    known = _bags([question for question, _ in train], tokenizer)
    asked = _bags(questions, tokenizer)
    common = asked @ known.T
    union = asked.sum(1, keepdims=True) + known.sum(1) - common
    return [train[i][1] for i in (common / union).argmax(1)]


def _bags(texts: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    bags = np.zeros((len(texts), tokenizer.vocab_size), np.float32)
    for row, ids in enumerate(tokenizer.encode_batch(texts)):
        bags[row, ids] = 1
    return bags
