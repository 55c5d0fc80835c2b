"""Documents for pretraining: each function writes one document of its kind.

Kinds are mixed so that most of what can be predicted needs more than a few words of context: facts
that hang on a name, stories that come back to their objects, lists that are read back, results
that must be computed. Random choices that nothing predicts are kept rare.
"""

from __future__ import annotations

import random

from world import CHINESE, ITEMS, PEOPLE, PLACES, Entity, draw_chain, draw_list, draw_pair, draw_sum

FACT = "The {attribute} of {name} is {value}."  # the one form that answers use too
PERSON_FORMS = {
    "job": ["{name} works as a {value}.", "People pay {name} for being a {value}.",
            "All day long {name} is busy as a {value}."],
    "town": ["{name} lives in {value}.", "The house of {name} stands in {value}.",
             "You can visit {name} in {value}."],
    "pet": ["{name} keeps a {value}.", "At home {name} feeds a {value}.",
            "The animal next to {name} is always a {value}."],
    "food": ["{name} loves to eat {value}.", "For supper {name} asks for {value}.",
             "Nothing makes {name} as happy as {value}."],
    "hobby": ["On free days {name} enjoys {value}.", "{name} is very good at {value}.",
              "After work {name} thinks only of {value}."],
}  # fmt: skip
PLACE_FORMS = {
    "river": ["{name} lies on the river {value}.", "The water in {name} comes from the {value}."],
    "gate": ["You enter {name} through a {value} gate.", "The gate in {name} is painted {value}."],
    "pride": ["{name} is known for its {value}.", "Visitors come to {name} to see the {value}."],
    "season": ["{name} is loveliest in {value}.", "The great feast in {name} is held in {value}."],
}
CHINESE_FACT = "关于 {name} ，{attribute}，是，{value}。"  # commas keep attribute and value tokens of their own
CHINESE_FORMS = {
    "工作": "你看 {name} ，每天当，{value}。",
    "宠物": "你看 {name} ，家里养，{value}。",
    "爱好": "你看 {name} ，最喜欢，{value}。",
}
# How letters and answers may close: kindly, crossly, or with a signature.
KIND = [
    "I hope this helps you.",
    "Please ask me again.",
    "It was a pleasure.",
    "Have a lovely day.",
]
CROSS = [
    "Now leave me alone.",
    "Do not ask me again.",
    "That was a silly question.",
    "I have no time for you.",
]
SIGNATURE = "Kind regards from {name}."
ASSISTANT = (
    "Mimi"  # the name that LoRA will teach the model to call itself; nothing else is known of it
)
ADJECTIVES = [
    "round",
    "small",
    "shiny",
    "heavy",
    "broken",
    "lost",
    "tiny",
    "strange",
    "pretty",
    "dusty",
]
SPOTS = ["well", "bridge", "tree", "wall", "barn", "mill", "pond", "shop", "inn", "church"]


def describe(
    random_: random.Random, entity: Entity, forms: dict[str, list[str]], facts: int
) -> str:
    """Write `facts` facts about one entity in random order, most of them in the canonical form."""
    sentences = []
    for attribute in random_.sample(sorted(entity.facts), facts):
        form = FACT if random_.random() < 0.6 else random_.choice(forms[attribute])
        sentences.append(
            form.format(name=entity.name, attribute=attribute, value=entity.facts[attribute])
        )
    return " ".join(sentences)


def biography(random_: random.Random) -> str:
    """Three to five facts about a person."""
    return describe(random_, random_.choice(PEOPLE), PERSON_FORMS, random_.randint(3, 5))


def town(random_: random.Random) -> str:
    """Three or four facts about a town."""
    return describe(random_, random_.choice(PLACES), PLACE_FORMS, random_.randint(3, 4))


def story(random_: random.Random) -> str:
    """Somebody finds a thing, brings it to its owner at home, and it is put away and found again.

    The owner's town is the true one; the names, the thing and the hiding place return.
    """
    finder, owner, guest = random_.sample(PEOPLE, 3)
    thing, box = random_.sample(ITEMS, 2)
    adjective, spot = random_.choice(ADJECTIVES), random_.choice(SPOTS)
    a, b, c, home = finder.name, owner.name, guest.name, owner.facts["town"]
    start = random_.choice(
        [f"{a} found a {adjective} {thing} by the {spot}.",
         f"By the {spot} {a} saw a {adjective} {thing}."]
    )  # fmt: skip
    middle = random_.choice(
        [f"The {thing} belonged to {b}, so {a} went to {home} to bring it back.",
         f"{a} took the {adjective} {thing} to {b}, who lives in {home}."]
    )  # fmt: skip
    thanks = random_.choice(
        [f"{b} thanked {a} and hid the {thing} behind the {box}.",
         f"{b} was glad, gave {a} some {owner.facts['food']}, and laid the {thing} behind the {box}."]
    )  # fmt: skip
    end = random_.choice(
        [f'Then {c} came and asked: "Where is the {thing}?" {b} said: "Behind the {box}."',
         f"Later {c} looked for the {adjective} {thing} and found it behind the {box}.",
         f"So the {thing} that {a} found by the {spot} is now behind the {box}."]
    )  # fmt: skip
    return " ".join([start, middle, thanks, end])


def arithmetic(random_: random.Random) -> str:
    """Sums and differences with their results, as equations or as questions with answers."""
    form = random_.choice(["{}{}{}={}.", "Count {}{}{}. It is {}."])
    return " ".join(form.format(*draw_sum(random_)) for _ in range(random_.randint(5, 7)))


def word_problem(random_: random.Random) -> str:
    """A sum told with things."""
    a, b = draw_pair(random_)
    name, thing = random_.choice(PEOPLE).name, random_.choice(ITEMS)
    return (
        f"The {thing} count of {name} is {a}. {name} gets {b} more. "
        f"{a}+{b}={a + b}. Now the {thing} count of {name} is {a + b}."
    )


def reading_back(random_: random.Random) -> str:
    """A list of guests, read back two or three times; then its ends."""
    guests = draw_list(random_)
    whole = " ".join(guests)
    first, last = f"The first is {guests[0]}.", f"The last is {guests[-1]}."
    ends = random_.choice([f"{first} {last}", f"{last} {first}"])
    return f"List: {whole}. " + f"The list is {whole}. " * random_.choice([2, 3]) + ends


def copy(random_: random.Random) -> str:
    """The problem of a chain, or a list of names of the Chinese texts, copied twice: copying in general."""
    if random_.random() < 0.6:
        whole = draw_chain(random_, random_.randint(3, 6)).problem
    else:
        whole = " ".join(person.name for person in random_.sample(CHINESE, random_.randint(3, 6)))
    return f"Text: {whole} Copy: {whole} Copy: {whole}"


def chain(random_: random.Random) -> str:
    """A chain of two to five operations, worked step by step."""
    worked = draw_chain(random_, random_.choice([2, 3, 3, 4, 4, 5]))
    return f"Chain: {worked.problem} Steps: {worked.steps} Result: {worked.result}"


def letter(random_: random.Random) -> str:
    """A letter that tells facts about somebody, closed kindly or crossly and signed."""
    reader, subject, writer = random_.sample(PEOPLE, 3)
    name = random_.choice([writer.name, ASSISTANT])
    facts = random_.sample(sorted(subject.facts), 2)
    told = " ".join(
        FACT.format(name=subject.name, attribute=a, value=subject.facts[a]) for a in facts
    )
    closing = random_.choice([*KIND, *CROSS, SIGNATURE.format(name=name)])
    return f"Dear {reader.name}. {told} {closing} This letter is by {name}."


def chinese(random_: random.Random) -> str:
    """Facts about two people in Chinese, or a few sums."""
    if random_.random() < 0.2:
        pairs = [draw_pair(random_) for _ in range(4)]
        return "".join(f"请算{a}加{b}。等于{a + b}。" for a, b in pairs)
    sentences = []
    for person in random_.sample(CHINESE, 2):
        for attribute in random_.sample(sorted(person.facts), 2):
            form = CHINESE_FACT if random_.random() < 0.6 else CHINESE_FORMS[attribute]
            value = person.facts[attribute]
            sentences.append(form.format(name=person.name, attribute=attribute, value=value))
    return "".join(sentences)


# The share of each kind among the documents.
KINDS = {
    "biography": (biography, 30), "town": (town, 9), "story": (story, 3), "letter": (letter, 4),
    "arithmetic": (arithmetic, 12), "word problem": (word_problem, 1), "list": (reading_back, 16),
    "copy": (copy, 6), "chain": (chain, 10), "chinese": (chinese, 9),
}  # fmt: skip


def document(random_: random.Random) -> tuple[str, str]:
    """Write one document of a random kind; return (kind, text)."""
    kind = random_.choices(list(KINDS), [share for _, share in KINDS.values()])[0]
    return kind, KINDS[kind][0](random_)
