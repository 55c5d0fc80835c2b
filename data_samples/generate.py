"""Write the built-in data. The same seed gives the same bytes.

python data_samples/generate.py              # beside this file
python data_samples/generate.py --out DIR    # elsewhere, to compare
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from chats import fact_pairs, heldout_chats, training_chats  # noqa: E402
from manners import personas, preferences  # noqa: E402
from problems import reasoning, unsolved  # noqa: E402
from texts import FACT, document  # noqa: E402
from world import PEOPLE, PLACES, SEED, held_out  # noqa: E402

from minimind.tokenizer import Tokenizer  # noqa: E402

TRAIN_BYTES = 6_000_000
HELDOUT_DOCUMENTS = 600
VOCAB_SIZE = 1536


def pretraining(random_: random.Random) -> tuple[list[dict], list[dict]]:
    """Write distinct documents; the hash of a document's text decides on which side it stands."""
    train, heldout, seen, size = [], [], set(), 0
    while size < TRAIN_BYTES:
        kind, text = document(random_)
        if text in seen:
            continue
        seen.add(text)
        if held_out("document " + text, percent=4):
            heldout.append({"text": text, "kind": kind})
        else:
            train.append({"text": text})
            size += len(text.encode("utf-8"))
    return train, heldout[:HELDOUT_DOCUMENTS]


def fact_prompts(random_: random.Random) -> list[dict]:
    """Sentences to complete, one for each fact: knowledge in the pretrained model.

    The facts stand in the training text (knowledge cannot be guessed); the measure is whether the
    model has taken them up.
    """
    rows = []
    for kind, entities in (("person", PEOPLE), ("place", PLACES)):
        for _, sentence in fact_pairs(entities, ["?"], FACT):
            prompt, answer = sentence.split(" is ")
            rows.append({"prompt": f"{prompt} is", "answer": f" {answer}", "kind": kind})
    return random_.sample(rows, 400)


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write JSON lines."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(lines.encode("utf-8"))


def main(out: Path) -> None:
    """Write all files into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    train, heldout = pretraining(random.Random(SEED + 1))
    chats = training_chats(random.Random(SEED + 2))
    files = {
        "pretrain.jsonl": train,
        "pretrain_heldout.jsonl": heldout,
        "facts_heldout.jsonl": fact_prompts(random.Random(SEED + 3)),
        "sft.jsonl": chats,
        "sft_heldout.jsonl": heldout_chats(random.Random(SEED + 4)),
        "lora.jsonl": personas(random.Random(SEED + 5)),
        "lora_heldout.jsonl": personas(random.Random(SEED + 6), reserved=True),
        "dpo.jsonl": preferences(random.Random(SEED + 7)),
        "dpo_heldout.jsonl": preferences(random.Random(SEED + 8), reserved=True),
        "reason.jsonl": reasoning(random.Random(SEED + 9)),
        "reason_heldout.jsonl": reasoning(random.Random(SEED + 10), reserved=True),
        "grpo.jsonl": unsolved(random.Random(SEED + 11)),
        "grpo_heldout.jsonl": unsolved(random.Random(SEED + 12), reserved=True),
        "distill.jsonl": random.Random(SEED + 13).sample(chats, 400),
        "distill_heldout.jsonl": heldout_chats(random.Random(SEED + 14)),
    }
    for name, rows in files.items():
        write_rows(out / name, rows)
    texts = [row["text"] for row in train]
    texts += [message["content"] for row in chats for message in row["conversations"]]
    Tokenizer.train(texts, VOCAB_SIZE).save(out / "tokenizer.json")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE)
    main(parser.parse_args().out)
