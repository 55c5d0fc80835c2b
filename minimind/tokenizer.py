"""Byte-level BPE tokenizer and the chat template.

The merges are learned and applied by the `tokenizers` library; this file decides what the course
needs on top: which tokens are special, digits one by one, and how a conversation becomes tokens.

Two kinds of added tokens:

- `<|endoftext|> <|im_start|> <|im_end|>` (ids 0, 1, 2) are *special*: only the template writes
  them. The same characters inside a message are ordinary text, so nobody can forge a turn.
- `<think> </think> <answer> </answer>` (ids 3-6) are ordinary text that happens to be one token
  each. That makes them easy to weight in the loss, and keeps them visible after decoding.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers, trainers

from minimind.errors import UserError

PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ROLES = ("system", "user", "assistant")

Message = dict[str, str]


class Tokenizer:
    """Text to token ids and back.

    `pad_id`, `bos_id`, `eos_id` are the ids of `<|endoftext|>`, `<|im_start|>`, `<|im_end|>`.
    `<|endoftext|>` also ends every pretraining document; `<|im_end|>` ends every chat turn.
    """

    def __init__(self, bpe: BPE, source: str = "a tokenizer") -> None:
        missing = [token for token in (PAD, BOS, EOS) if bpe.token_to_id(token) is None]
        if missing:
            raise UserError(
                f"The tokenizer in {source} has no token {missing[0]!r}, which the chat template "
                f"needs. Train one with Tokenizer.train, or add {', '.join(missing)} to it."
            )
        # Special tokens are written by the template alone: in a text they are plain characters.
        bpe.encode_special_tokens = True
        self._bpe = bpe
        self.pad_id, self.bos_id, self.eos_id = (bpe.token_to_id(t) for t in (PAD, BOS, EOS))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 6400) -> Tokenizer:
        """Learn byte-level BPE merges from `texts` (Sennrich et al., arXiv 1508.07909).

        All 256 bytes are in the vocabulary, so any text in any language can be encoded. Digits
        are never merged: "62" is always "6", "2", which makes arithmetic learnable.
        """
        bpe = BPE(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, BOS, EOS, *TAGS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        content = json.loads(bpe.to_str())
        for token in content["added_tokens"]:  # the trainer marks all seven as special
            token["special"] = token["content"] not in TAGS
        return cls.from_json(json.dumps(content))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read any `tokenizer.json`, or the one in a folder. UserError if it is none."""
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise UserError(
                f"There is no tokenizer at {file}. Give a tokenizer.json or its folder."
            )
        try:
            bpe = BPE.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise UserError(f"{file} is not a tokenizer.json ({error}). Make it again.") from error
        return cls(bpe, source=str(file))

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Read the content of a `tokenizer.json`, as `to_json` gave it. UserError if it is none."""
        try:
            return cls(BPE.from_str(text))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"The tokenizer cannot be read ({error}). Make it again.") from error

    def to_json(self) -> str:
        """Return the content of a `tokenizer.json`."""
        return self._bpe.to_str(pretty=True)

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` that `load` and Hugging Face's libraries read."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self._bpe.get_vocab_size(with_added_tokens=True)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token, added ones included, and its id."""
        return self._bpe.get_vocab(with_added_tokens=True)

    @property
    def tag_ids(self) -> dict[str, int]:
        """Ids of the four reasoning tags. UserError if one of them is not a single token."""
        ids = {tag: self._bpe.token_to_id(tag) for tag in TAGS}
        missing = [tag for tag, index in ids.items() if index is None]
        if missing:
            raise UserError(
                f"{missing[0]!r} is not a single token of this tokenizer, so its weight would fall "
                "on every '<' and '>'. Use a tokenizer that has the four tags as tokens."
            )
        return ids

    @property
    def ends_words_at_spaces(self) -> bool:
        """Whether a token never holds a space, or a line end, together with what stands before it.

        It is so in byte-level BPE (GPT-2's pattern) if nothing is normalised and no added token
        looks at its surroundings: a text may then be encoded in pieces that begin with a space.
        """
        content = json.loads(self.to_json())
        steps = content["pre_tokenizer"] or {}
        steps = steps.get("pretokenizers", [steps])
        return (
            content["normalizer"] is None
            and {step.get("type") for step in steps} in ({"ByteLevel"}, {"ByteLevel", "Digits"})
            and not any(step.get("add_prefix_space") for step in steps)
            and all(step.get("use_regex", True) for step in steps)
            and not any(
                token["lstrip"] or token["rstrip"] or token["single_word"] or not token["content"].strip()
                or any(character.isspace() for character in token["content"])
                for token in content["added_tokens"]
            )
        )  # fmt: skip

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`. Nothing is added at either end."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of every text, computed on all cores; other threads go on meanwhile."""
        return [e.ids for e in self._bpe.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; the reasoning tags stay, special tokens go (by default)."""
        return self._bpe.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def tokens(self, text: str) -> list[str]:
        """Return the pieces of `text`, for looking at: `[" Quin", " is", ...]`.

        A piece that cuts a character in two (Chinese) shows as the replacement character.
        """
        return [self._bpe.decode([i], skip_special_tokens=False) for i in self.encode(text)]

    def encode_turn(self, message: Message) -> tuple[list[int], list[int], list[int]]:
        """Return one turn as three lists of ids: header, body, tail.

        header `<|im_start|>role\\n`, body `content<|im_end|>`, tail `\\n`. They are encoded apart,
        so the ids of a prompt are always a prefix of the ids of the whole conversation.
        """
        header = [self.bos_id, *self.encode(message["role"] + "\n")]
        return header, [*self.encode(message["content"]), self.eos_id], self.encode("\n")

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> list[int]:
        """Return a conversation in the template `<|im_start|>role\\ncontent<|im_end|>\\n`.

        With `add_generation_prompt` it ends in `<|im_start|>assistant\\n`, ready for an answer.
        """
        ids = [i for message in messages for part in self.encode_turn(message) for i in part]
        if add_generation_prompt:
            ids += self.encode_turn({"role": "assistant", "content": ""})[0]
        return ids
