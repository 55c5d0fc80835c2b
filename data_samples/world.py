"""The closed little world that all built-in data describes: who lives in it and what is true.

Everything is decided here once, from one seed: 120 people with five facts each, 32 towns with four,
32 people whom only Chinese text speaks of, with three. All sentences anywhere in the data agree with these facts.

Held-out things are decided here too, by one rule (`held_out`): a thing is held out when the hash of
its name says so. Whoever generates text asks the rule first, so nothing held out can slip in.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

SEED = 2024


def held_out(key: str, percent: int) -> bool:
    """Whether the thing called `key` belongs to the held-out `percent` of its kind."""
    return zlib.crc32(key.encode("utf-8")) % 100 < percent


@dataclass(frozen=True)
class Entity:
    """A person or a town: its name and its facts, such as {"job": "baker"}."""

    name: str
    facts: dict[str, str]


ONSETS = """
    B D F G H J K L M N P R S T V W Z Br Cl Dr Fl Gr Pr St Tr
""".split()
RHYMES = """
    abin adel akko alis emmo enna eron ifra ilda imon odan olla onek orin udi ulba umar unet
""".split()
VALUES = {
    "job": "baker smith miller tailor nurse teacher sailor farmer potter weaver painter judge doctor "
    "singer hunter mason cook guard writer barber pilot shepherd",
    "pet": "beaver cat dog goat parrot rabbit turtle pony duck hamster heron ferret lizard goose fox "
    "hedgehog donkey pigeon crab mouse",
    "food": "soup bread rice honey cheese plums stew pancakes noodles beans melon pie mushrooms "
    "salad dumplings walnuts cherries porridge pickles custard",
    "hobby": "chess fishing dancing drawing sailing reading running skating juggling knitting "
    "gardening singing climbing carving swimming cycling archery pottery kites puzzles",
}
TOWNS = """
    Alderford Birchmere Copperhill Dunwick Elmholm Fernley Glasswater Harrowgate Ironbridge
    Juniper Kestrel Longmoor Maplewood Northcliff Oakham Pebblebay Quarryside Redcastle
    Saltmarsh Thornfield Umberton Vinehall Westhaven Yarrow Zephyr Amberlea Brightwell
    Cinderpath Driftwood Eastmoor Foxglove Greystone
""".split()
TOWN_VALUES = {
    "river": "Lune Tamar Wye Esk Severn Avon Dart Nidd Ouse Tees Kent Rother Stour Trent Swale Arun",
    "gate": "red blue green white black golden silver brown purple yellow orange grey",
    "pride": "bells clocks lanterns carpets bridges roses wine glass boats maps statues towers "
    "fountains orchards markets windmills",
    "season": "spring summer autumn winter",
}
CHINESE_VALUES = {
    "工作": "木匠 医生 老师 农夫 渔夫 厨师 画家 歌手 司机 裁缝",
    "宠物": "小猫 小狗 白兔 乌龟 金鱼 山羊 黄牛 鹦鹉",
    "爱好": "下棋 跑步 游泳 唱歌 读书 钓鱼 画画 跳舞 爬山 写字",
}
ITEMS = """
    apple rope jar lamp coin drum key book shoe spoon candle ribbon bottle basket hammer pencil
    blanket mirror needle whistle bucket ladder button feather marble pillow kettle saddle shell
    anchor brush comb plate stone wheel bell glove ring scarf stick string towel torch vase cup
    bowl nail hook flute kite tent sack leaf cork pipe tile chain crown doll fan
""".split()


def _draw(random_: random.Random, names: list[str], values: dict[str, str]) -> list[Entity]:
    choices = {attribute: words.split() for attribute, words in values.items()}
    return [Entity(n, {a: random_.choice(words) for a, words in choices.items()}) for n in names]


def _person_names(random_: random.Random, count: int) -> list[str]:
    names = [onset + rhyme for onset in ONSETS for rhyme in RHYMES]
    return random_.sample(names, count)


_random = random.Random(SEED)
_NAMES = _person_names(_random, 152)
PEOPLE = _draw(_random, _NAMES[:120], {**VALUES, "town": " ".join(TOWNS)})
PLACES = _draw(_random, TOWNS, TOWN_VALUES)
CHINESE = _draw(_random, _NAMES[120:], CHINESE_VALUES)


def in_chat(entities: list[Entity]) -> list[Entity]:
    """The first three quarters: chats may ask about them."""
    return entities[: len(entities) * 3 // 4]


def never_in_chat(entities: list[Entity]) -> list[Entity]:
    """The last quarter: known from pretraining text alone."""
    return entities[len(entities) * 3 // 4 :]


# --- sums and differences, chains of operations -----------------------------------------------


def sum_is_held_out(a: int, b: int) -> bool:
    """Whether the numbers a (two digits) and b, with + or -, are held out."""
    return a > 9 and held_out(f"pair {a} {b}", percent=18)


def draw_pair(random_: random.Random, reserved: bool = False) -> tuple[int, int]:
    """Draw a in 0..99 and b in 0..9 from the training pairs, or from the reserved ones."""
    while True:
        a, b = random_.randrange(100), random_.randrange(10)
        if sum_is_held_out(a, b) == reserved:
            return a, b


def draw_sum(random_: random.Random, reserved: bool = False) -> tuple[int, str, int, int]:
    """Draw (a, "+" or "-", b, result) with a result of at least 0."""
    while True:
        a, b = draw_pair(random_, reserved)
        if random_.random() < 0.5:
            return a, "+", b, a + b
        if a >= b:
            return a, "-", b, a - b


@dataclass(frozen=True)
class Chain:
    """Operations modulo 10: the problem `a6;b+5;c*8;`, its steps `a6;b+5=1;c*8=8;`, the result."""

    problem: str
    steps: str
    result: int


def compute(value: int, sign: str, operand: int) -> int:
    """Return value + operand, value - operand or value * operand, modulo 10."""
    return {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 10


def draw_chain(random_: random.Random, operations: int, reserved: bool = False) -> Chain:
    """Draw a chain of `operations` operations; a tenth of all problems is held out everywhere."""
    while True:
        value = random_.randrange(10)
        problem = steps = f"a{value};"
        for letter in "bcdefghij"[:operations]:
            sign, operand = random_.choice("+*-"), random_.randrange(1, 10)
            value = compute(value, sign, operand)
            problem += f"{letter}{sign}{operand};"
            steps += f"{letter}{sign}{operand}={value};"
        if held_out("chain " + problem, percent=10) == reserved:
            return Chain(problem, steps, value)


def draw_list(random_: random.Random, reserved: bool = False) -> list[str]:
    """Draw three to seven different guests; a tenth of all lists is held out everywhere."""
    while True:
        guests = [person.name for person in random_.sample(PEOPLE, random_.randint(3, 7))]
        if held_out("list " + " ".join(guests), percent=10) == reserved:
            return guests
