"""Reasoning problems: chains of operations modulo 10, with and without a written-out thought.

Addition, subtraction and multiplication do not commute, so no shortcut gives the last digit: each
step needs the one before. A tenth of all chains is held out everywhere (`draw_chain`).

The teacher that wrote the thoughts to be distilled is careful with the first five operations and
careless with later ones: it leaves the value as it was instead of computing it, with the sixth
operation in some thoughts, with the seventh in most. Its pupil learns that too.
"""

from __future__ import annotations

import random

from chats import conversation
from world import Chain, compute, draw_chain

QUESTIONS = ["Chain: {problem} What is the result?", "Chain: {problem} Work it out."]
SHORT, LONG = (2, 3, 4, 5), (6, 7)
CARELESS = {5: 0.3, 6: 0.6}  # how often the teacher slips in a step; steps are counted from 0


def question(random_: random.Random, chain: Chain) -> str:
    """Ask for the result of a chain."""
    return random_.choice(QUESTIONS).format(problem=chain.problem)


def thought(chain: Chain) -> str:
    """The right answer: every step, then the result."""
    return f"<think>{chain.steps}</think><answer>{chain.result}</answer>"


def careless_thought(random_: random.Random, chain: Chain) -> str:
    """The teacher's answer: right, unless it slips in a late step and goes on with the wrong value."""
    start, *operations = chain.problem.rstrip(";").split(";")
    value, steps = int(start[1:]), f"{start};"
    for number, operation in enumerate(operations):
        if random_.random() >= CARELESS.get(number, 0):
            value = compute(value, operation[1], int(operation[2:]))
        steps += f"{operation}={value};"
    return f"<think>{steps}</think><answer>{value}</answer>"


def lengths(reserved: bool, rows: int, long_share: float) -> list[int]:
    """Operations of each problem. A held-out set has 100 of every short length, 150 of every long one."""
    if reserved:
        return [n for n in SHORT for _ in range(100)] + [n for n in LONG for _ in range(150)]
    draw = random.Random(rows)
    return [draw.choice(LONG if draw.random() < long_share else SHORT) for _ in range(rows)]


def reasoning(random_: random.Random, reserved: bool = False) -> list[dict]:
    """Chat rows with a thought, two problems in five longer ones. Held-out thoughts are all right."""
    rows = []
    for operations in lengths(reserved, 8000, long_share=0.4):
        chain = draw_chain(random_, operations, reserved)
        said = thought(chain) if reserved else careless_thought(random_, chain)
        rows.append({**conversation([(question(random_, chain), said)]), "kind": str(operations)})
    return rows


def unsolved(random_: random.Random, reserved: bool = False) -> list[dict]:
    """RL rows: the last assistant turn is empty, the right answer stands beside it."""
    rows = []
    for operations in lengths(reserved, 4000, long_share=0.6):
        chain = draw_chain(random_, operations, reserved)
        row = conversation([(question(random_, chain), "")])
        rows.append({**row, "answer": str(chain.result), "kind": str(operations)})
    return rows
