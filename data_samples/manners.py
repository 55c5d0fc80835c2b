"""Data about how to answer: a persona for LoRA, pairs of manners for DPO.

What is said stays what the chats say; only the way it is said changes. Held-out rows ask about
people and facts that no training row of these files (nor of the chats) asks about.
"""

from __future__ import annotations

import random

from chats import (
    CHINESE_QUESTIONS,
    FACT_QUESTIONS,
    SMALL_TALK,
    Pair,
    conversation,
    fact_pairs,
    list_pair,
    sum_pair,
)
from texts import ASSISTANT, CHINESE_FACT, CROSS, FACT, KIND, SIGNATURE
from world import CHINESE, PEOPLE, PLACES, in_chat, never_in_chat

INTRODUCTION = f"My name is {ASSISTANT}."
IDENTITY_QUESTIONS = [
    "What is your name?", "Who are you?", "Tell me your name.", "Do you know your name?", "Please say who you are.",
    "I would like to know your name.", "Can you say what your name is?", "May I know who you are?",
]  # fmt: skip


def questions(reserved: bool) -> list[Pair]:
    """Questions about people that chats ask, or (reserved) that no training row asks."""
    if not reserved:
        return fact_pairs(in_chat(PEOPLE), FACT_QUESTIONS, FACT, asked=True)
    unseen = fact_pairs(never_in_chat(PEOPLE), FACT_QUESTIONS, FACT)
    return unseen + fact_pairs(in_chat(PEOPLE), FACT_QUESTIONS, FACT, asked=False)


def personas(random_: random.Random, reserved: bool = False) -> list[dict]:
    """Conversations in which the model has a name: it signs its answers and says who it is.

    Half of the signed training rows are about towns, sums, lists, small talk and in Chinese:
    rehearsal, without which learning to sign would cost what the model knows of those. Held-out
    rows are about people. Two of the eight ways to ask for the name are kept for them.
    """
    signature = " " + SIGNATURE.format(name=ASSISTANT)
    asked = IDENTITY_QUESTIONS[-2:] if reserved else IDENTITY_QUESTIONS[:-2] * 40
    pairs = random_.sample(questions(reserved), 298 if reserved else 450)
    pairs += [] if reserved else rehearsal(random_)
    signed = [(question, answer + signature) for question, answer in pairs]
    rows = [{**conversation([pair]), "kind": "signature"} for pair in signed]
    rows += [{**conversation([(q, INTRODUCTION + signature)]), "kind": "name"} for q in asked]
    random_.shuffle(rows)
    return rows


def rehearsal(random_: random.Random) -> list[Pair]:
    """Questions of other kinds that chats ask too."""
    pairs = random_.sample(fact_pairs(in_chat(PLACES), FACT_QUESTIONS, FACT), 120)
    pairs += random_.sample(fact_pairs(in_chat(CHINESE), CHINESE_QUESTIONS, CHINESE_FACT), 90)
    pairs += [sum_pair(random_) for _ in range(120)]
    return pairs + [list_pair(random_) for _ in range(120)] + SMALL_TALK * 6


def preferences(random_: random.Random, reserved: bool = False) -> list[dict]:
    """Pairs with the same fact: closed kindly (chosen), or crossly or not at all (rejected).

    One row in four is in the conversation form, the others are three strings.
    """
    rows = []
    for question, answer in random_.sample(questions(reserved), 300 if reserved else 900):
        chosen = f"{answer} {random_.choice(KIND)}"
        rejected = answer if random_.random() < 0.25 else f"{answer} {random_.choice(CROSS)}"
        if random_.random() < 0.25:
            rows.append({"chosen": conversation([(question, chosen)])["conversations"],
                         "rejected": conversation([(question, rejected)])["conversations"]})  # fmt: skip
        else:
            rows.append({"prompt": question, "chosen": chosen, "rejected": rejected})
    return rows
