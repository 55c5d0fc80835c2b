"""What several tests need: small files in the guide's formats."""

import json
import random

import torch


def write_lines(path, rows):
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def texts(count=60, seed=0):
    rng = random.Random(seed)
    words = [
        "the",
        "job",
        "of",
        "pet",
        "town",
        "is",
        "a",
        "baker",
        "miller",
        "otter",
        "in",
        "and",
        "lives",
        "likes",
        "bread",
    ]
    return [{"text": " ".join(rng.choices(words, k=rng.randint(5, 40)))} for _ in range(count)]


def chats(count=30, seed=0):
    rng = random.Random(seed)
    return [
        {"conversations": [{"role": "user", "content": "say " + "na " * rng.randint(1, 25)},
                           {"role": "assistant", "content": "yes " * rng.randint(1, 9)}]}
        for _ in range(count)
    ]  # fmt: skip


SMALL = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_seq_len=32, batch_size=4, dtype="float32",
    log_interval=1, save_interval=3, learning_rate=1e-3, accumulation_steps=2, epochs=2,
)  # fmt: skip


@torch.no_grad()
def ends_now_and_then(model, eos_id, strength=1.6):
    """Give the end a chance everywhere, by a direction of the hidden states that is always there."""
    model.model.embed_tokens.weight[:, 0], model.model.norm.weight[0] = 10.0, 1.0
    model.lm_head.weight[eos_id] = 0.0
    model.lm_head.weight[eos_id, 0] = strength
