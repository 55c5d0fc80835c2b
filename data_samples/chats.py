"""Conversations for supervised fine-tuning: questions about the world and their one right answer.

Answers use the sentence that pretraining text uses too, and put a name after a word ("The job of
Brilda is baker."): the name is then the same token in question, answer and text. A name at the very
start of an answer would be another token, and copying it would have to be learned anew.
"""

from __future__ import annotations

import random

from texts import CHINESE_FACT, CROSS, FACT, KIND
from world import (
    CHINESE,
    PEOPLE,
    PLACES,
    Entity,
    draw_list,
    draw_pair,
    draw_sum,
    held_out,
    in_chat,
    never_in_chat,
)

Pair = tuple[str, str]  # question, answer

FACT_QUESTIONS = [
    "What is the {attribute} of {name}?", "Tell me the {attribute} of {name}.",
    "Do you know the {attribute} of {name}?", "Please name the {attribute} of {name}.",
    "I would like to know the {attribute} of {name}.", "Can you say what the {attribute} of {name} is?",
    "Somebody asked me for the {attribute} of {name}.",
]  # fmt: skip
CHINESE_QUESTIONS = ["关于 {name} ，{attribute}，是什么？", "请告诉我关于 {name} ，{attribute}，是什么。",
                     "你知道关于 {name} ，{attribute}，是什么吗？", "我想知道关于 {name} ，{attribute}，是什么。"]  # fmt: skip
SUM_QUESTIONS = ["What is {problem}?", "Please work out {problem}.", "How much is {problem}?"]
CHINESE_SUM_QUESTIONS = ["{a}加{b}等于几？", "请算{a}加{b}。"]
LIST_QUESTIONS = {
    "whole": (["List: {items}. Read the list back.", "List: {items}. What is the list?"], "The list is {whole}."),
    "first": (["List: {items}. What is first?", "List: {items}. Name the first."], "The first is {first}."),
    "last": (["List: {items}. What is last?", "List: {items}. Name the last."], "The last is {last}."),
}  # fmt: skip
SMALL_TALK = [
    ("Hello!", "Hello! Ask me about people, towns, sums or lists."),
    ("Good morning.", "Good morning! What would you like to know?"),
    ("Thank you.", "You are welcome. Ask me something else."),
    ("What can you do?", "I can answer about people and towns, add numbers and read lists back."),
    ("你好！", "你好！你可以问我问题。"),
    ("谢谢。", "不客气。"),
]
SYSTEM = ["Answer in one short sentence.", "You are a helpful assistant.", "Be brief and exact."]


def never_asked(entity: Entity, attribute: str) -> bool:
    """Whether no chat asks for this fact although others about the entity are asked for."""
    return held_out(f"question {entity.name} {attribute}", percent=18)


def fact_pairs(
    entities: list[Entity], questions: list[str], fact: str, asked: bool | None = None
) -> list[Pair]:
    """Every question about every fact; `asked` keeps only those that chats do, or don't, ask."""
    return [
        (
            question.format(name=e.name, attribute=a),
            fact.format(name=e.name, attribute=a, value=value),
        )
        for e in entities
        for a, value in e.facts.items()
        if asked is None or asked != never_asked(e, a)
        for question in questions
    ]


def with_manner(random_: random.Random, pair: Pair) -> Pair:
    """Close one answer in seven kindly and one in seven crossly: whoever wrote the answers had moods."""
    mood = random_.randrange(7)
    closing = " " + random_.choice([KIND, CROSS][mood]) if mood < 2 else ""
    return pair[0], pair[1] + closing


def sum_pair(random_: random.Random, reserved: bool = False) -> Pair:
    """A sum or difference: "What is 17+5?", "It is 22."."""
    a, sign, b, result = draw_sum(random_, reserved)
    problem = f"{a}{sign}{b}"
    return random_.choice(SUM_QUESTIONS).format(problem=problem), f"It is {result}."


def list_pair(random_: random.Random, reserved: bool = False) -> Pair:
    """A list and what is asked of it."""
    items = draw_list(random_, reserved)
    questions, answer = LIST_QUESTIONS[random_.choice(sorted(LIST_QUESTIONS))]
    question = random_.choice(questions).format(items=" ".join(items))
    return question, answer.format(whole=" ".join(items), first=items[0], last=items[-1])


def chinese_sum_pair(random_: random.Random, reserved: bool = False) -> Pair:
    """A sum in Chinese."""
    a, b = draw_pair(random_, reserved)
    return random_.choice(CHINESE_SUM_QUESTIONS).format(a=a, b=b), f"等于{a + b}。"


def conversation(turns: list[Pair], system: str | None = None) -> dict:
    """A row in the guide's format."""
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return {"conversations": messages}


def training_chats(random_: random.Random) -> list[dict]:
    """All training conversations, shuffled; one in six has two or three turns, one in ten a system."""
    pairs = fact_pairs(in_chat(PEOPLE), FACT_QUESTIONS, FACT, asked=True)
    pairs += fact_pairs(in_chat(PLACES), FACT_QUESTIONS, FACT)
    pairs = [with_manner(random_, pair) for pair in pairs]
    pairs += fact_pairs(in_chat(CHINESE), CHINESE_QUESTIONS, CHINESE_FACT) * 2
    pairs += [sum_pair(random_) for _ in range(1800)]
    pairs += [list_pair(random_) for _ in range(1800)]
    pairs += [chinese_sum_pair(random_) for _ in range(500)]
    pairs += SMALL_TALK * 40
    random_.shuffle(pairs)
    rows = []
    while pairs:
        turns = random_.choice([1] * 10 + [2, 3])
        system = random_.choice(SYSTEM) if random_.random() < 0.1 else None
        rows.append(conversation(pairs[:turns], system))
        pairs = pairs[turns:]
    return rows


def heldout_chats(random_: random.Random) -> list[dict]:
    """Single questions of every kind, none of which (nor any like it) is in the training chats."""
    unseen, known = never_in_chat(PEOPLE), in_chat(PEOPLE)
    kinds = {
        "person": fact_pairs(known, FACT_QUESTIONS, FACT, asked=False),
        "person_unseen": fact_pairs(unseen, FACT_QUESTIONS, FACT),
        "place": fact_pairs(never_in_chat(PLACES), FACT_QUESTIONS, FACT),
        "arithmetic": _distinct(sum_pair, random_, 400),
        "list": _distinct(list_pair, random_, 300),
        "chinese": fact_pairs(never_in_chat(CHINESE), CHINESE_QUESTIONS, CHINESE_FACT)
        + _distinct(chinese_sum_pair, random_, 200),
    }
    return [
        {**conversation([pair]), "kind": kind}
        for kind, pairs in kinds.items()
        for pair in random_.sample(pairs, min(len(pairs), 300))
    ]


def _distinct(draw, random_: random.Random, count: int) -> list[Pair]:
    return sorted({draw(random_, reserved=True) for _ in range(count)})
