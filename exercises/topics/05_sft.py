"""Exercises 05: what is predicted from what, padding, exact match, the chat mask, batches."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

from checks import Exercise, sentence

from minimind.tokenizer import Tokenizer

TITLE = "Supervised fine-tuning"
PRACTISES = (
    "lining up a mask with shifted labels, counting padding, measuring answers honestly, marking "
    "what an assistant says, batching rows of like length."
)


@cache
def toy_tokenizer() -> Tokenizer:
    texts = [
        "user\nWho is Quin?\n\nassistant\nQuin is a baker.\n\nsystem\nAnswer in one short sentence.\n",
        "The pet of Molla is cat. 37+9=46. Hello! I am a small model, not an assistant for cats.\n",
    ]
    return Tokenizer.train(texts * 3, vocab_size=340)


# 1. What is predicted from what


def trained_pairs(input_ids: list[int], labels: list[int]) -> list[tuple[int, int]]:
    """Return (the token just read, the token to be guessed) for every guess that is trained.

    Args:
        input_ids: (T,) token ids.
        labels: (T,) aligned with them: the id itself where it is trained, -100 elsewhere. The loss
            shifts them by one, as in pretraining.
    """
    ### BEGIN SOLUTION
    return [(read, label) for read, label in zip(input_ids, labels[1:]) if label != -100]
    ### END SOLUTION


def trained_pairs_cases(seed: int) -> list[tuple]:
    draw = random.Random(seed)
    ids = draw.sample(range(10, 99), 9)
    mask = [False, False, True, True, False, False, False, True, True]
    drawn = [i if trained else -100 for i, trained in zip(ids, mask)]
    return [
        ([1, 50, 7, 8, 2], [-100, -100, 7, 8, 2]),
        (ids, drawn),
        ([5, 6, 7], [5, 6, 7]),
        ([5, 6, 7, 0], [-100, 6, -100, -100]),
        ([5, 6], [-100, -100]),
    ]


def not_shifted(input_ids, labels):
    """In your pairs a token is guessed by the position that has just read it: a model that looks
    at the answer."""
    return [(read, label) for read, label in zip(input_ids, labels) if label != -100]


def shifted_twice(input_ids, labels):
    """You shift by two: a token in between is skipped."""
    return [(read, label) for read, label in zip(input_ids, labels[2:]) if label != -100]


def shifted_backwards(input_ids, labels):
    """You guess backwards, a token from the one after it."""
    return [(read, label) for read, label in zip(input_ids[1:], labels) if label != -100]


def masked_by_reader(input_ids, labels):
    """You ask whether the token that was *read* is trained; what matters is whether the one to be
    guessed is."""
    triples = zip(input_ids, labels, input_ids[1:])
    return [(read, following) for read, label, following in triples if label != -100]


def ignored_kept(input_ids, labels):
    """You keep pairs whose answer is -100; nothing is trained there."""
    return list(zip(input_ids, labels[1:]))


TRAINED_PAIRS = Exercise(
    solution=trained_pairs,
    cases=trained_pairs_cases,
    title="What is guessed from what?",
    difficulty=1,
    importance=5,
    minutes=10,
    statement="""
No question is asked more often: how does the mask line up with the shifted labels? Answer it once with
your own hands and it is clear for good.

For `input_ids = [1, 50, 7, 8, 2]` and `labels = [-100, -100, 7, 8, 2]` list what the model reads and
what it must guess then, for all guesses that count. **Before you write:** which token is read when the
first token of the answer is guessed? Is *its* label -100?
""",
    hints=[
        "Write the ids in one row and the labels in the row below. Now push the lower row by one.",
        "`zip` stops at the shorter list, so a slice of one of the two does the shift.",
    ],
    mistakes=[not_shifted, shifted_twice, shifted_backwards, masked_by_reader, ignored_kept],
    discussion="The first token of an answer is guessed at the last token of the header, whose own label "
    "is -100. So masking the header does not lose the first token: labels say what is *guessed*.",
)  # fmt: skip


# 2. Padding


def padding_share(lengths: list[int], batches: list[list[int]]) -> float:
    """Return the share of positions that are padding, over all batches.

    Args:
        lengths: tokens in each row.
        batches: lists of row numbers. In a batch all rows are padded to the longest of them.
    """
    ### BEGIN SOLUTION
    positions = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    tokens = sum(lengths[row] for batch in batches for row in batch)
    return 1 - tokens / positions
    ### END SOLUTION


def padding_share_cases(seed: int) -> list[tuple]:
    draw = random.Random(seed)
    lengths = [draw.randint(3, 60) for _ in range(14)]
    rows = draw.sample(range(14), 11)  # not every row is used
    return [
        ([2, 4], [[0, 1]]),
        ([10, 10, 2, 1, 9], [[0, 1], [2, 3, 4]]),
        (lengths, [rows[:4], rows[4:6], rows[6:]]),
    ]


def useful_for_padding(lengths, batches):
    """You return the share that is text; asked for is the rest."""
    return 1 - padding_share(lengths, batches)


def padded_to_longest_of_all(lengths, batches):
    """You pad every batch to the longest row of the whole data; a batch is as wide as its own
    longest."""
    rows = [row for batch in batches for row in batch]
    return 1 - sum(lengths[r] for r in rows) / (len(rows) * max(lengths))


def mean_over_batches(lengths, batches):
    """You average the batches' shares, as if a batch of two rows cost as much as one of twenty."""
    return sum(padding_share(lengths, [batch]) for batch in batches) / len(batches)


def padding_per_token(lengths, batches):
    """You divide the padding by the text, and not by all that is computed."""
    share = padding_share(lengths, batches)
    return share / (1 - share)


def rows_in_order(lengths, batches):
    """A batch holds row numbers, not lengths, and not simply the next rows of the list."""
    rest, regrouped = list(range(len(lengths))), []
    for batch in batches:
        regrouped.append(rest[: len(batch)])
        rest = rest[len(batch) :]
    return padding_share(lengths, regrouped)


PADDING_SHARE = Exercise(
    solution=padding_share,
    cases=padding_share_cases,
    title="What padding costs",
    difficulty=1,
    importance=3,
    minutes=10,
    statement="""
Chat rows are short and long. In a batch they are padded to the longest, and padding is computed like
text. Measure it: `padding_share([2, 4], [[0, 1]])` is 0.25, because two rows of four positions hold six
tokens. (A random order of the course's chats wastes more than half; the last exercise does better.)
""",
    hints=[
        "How many positions does one batch compute? Its rows times what?",
        "Sum positions over all batches, sum tokens over all batches, and divide once.",
    ],
    mistakes=[useful_for_padding, padded_to_longest_of_all, mean_over_batches, padding_per_token,
              rows_in_order],
)  # fmt: skip


# 3. Exact match


def exact_match(
    outputs: list[list[int]], answers: list[str], decode: Callable[[list[int]], str], eos_id: int
) -> float:
    """Return the share of outputs that are exactly the right answer.

    Args:
        outputs: token ids that a model wrote. What counts ends before the first `eos_id`; an output
            without one (it ran into the length limit) counts as it stands.
        answers: the right texts, in the same order. White space at either end does not matter.
        decode: ids to text; it leaves special tokens out.
    """
    ### BEGIN SOLUTION
    right = 0
    for ids, answer in zip(outputs, answers):
        if eos_id in ids:
            ids = ids[: ids.index(eos_id)]
        right += decode(ids).strip() == answer.strip()
    return right / len(answers)
    ### END SOLUTION


def exact_match_cases(seed: int) -> list[tuple]:
    one, two = random.Random(seed).sample(["cat", "kite", "baker", "tea"], 2)
    end = "<|im_end|>"
    return [
        ([f"{one}{end}", f"{two}{end}"], [one, one]),
        ([f"{one}{end}\n{two}", f"{one}{end}{two}{end}", f"{two}{end}{end}"], [one, one, two]),
        ([f"not {one}{end}", f"{one}.{end}", f"{two}{end}", ""], [one, one, two, two]),
        (
            [one, f" {two}\n{end}", f"{one.upper()}{end}", end, f"{one}{end}"],
            [one, two, one, one, one],
        ),
        (["46", f"4{end}6", f"{one} or {two}{end}", f"{two}{end}"], ["46", "46", one, two]),
    ]


def run_exact_match(function, outputs, answers):
    """Cases are written as text; here they become ids."""
    t = toy_tokenizer()

    def ids(text: str) -> list[int]:
        first, *others = (t.encode(part) for part in text.split("<|im_end|>"))
        return first + [i for other in others for i in (t.eos_id, *other)]

    return function([ids(text) for text in outputs], answers, t.decode, t.eos_id)


def until_end(ids, eos_id):
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def match_rate(outputs, answers, decode, eos_id, right):
    texts = [decode(until_end(ids, eos_id)) for ids in outputs]
    return sum(right(text.strip(), answer.strip()) for text, answer in zip(texts, answers)) / len(
        answers
    )


def not_cut(outputs, answers, decode, eos_id):
    """You read on after the end of the turn; whatever the model babbles there is not its answer."""
    pairs = zip(outputs, answers)
    return sum(decode(ids).strip() == a.strip() for ids, a in pairs) / len(answers)


def cut_at_the_last_end(outputs, answers, decode, eos_id):
    """An answer ends at the first end token, not at the last."""
    right = 0
    for ids, answer in zip(outputs, answers):
        if eos_id in ids:
            ids = ids[: len(ids) - 1 - ids[::-1].index(eos_id)]
        right += decode(ids).strip() == answer.strip()
    return right / len(answers)


def answer_inside(outputs, answers, decode, eos_id):
    """You are content if the answer stands somewhere in the text: "not a cat" would be right for
    "cat"."""
    return match_rate(outputs, answers, decode, eos_id, lambda text, answer: answer in text)


def answer_at_the_start(outputs, answers, decode, eos_id):
    """You are content if the text begins with the answer; what follows may take it back."""
    return match_rate(
        outputs, answers, decode, eos_id, lambda text, answer: text.startswith(answer)
    )


def text_inside(outputs, answers, decode, eos_id):
    """You look for the output in the answer, so a model that says nothing is always right."""
    return match_rate(outputs, answers, decode, eos_id, lambda text, answer: text in answer)


def spaces_matter(outputs, answers, decode, eos_id):
    """You count a space or a line break at the end as an error."""
    texts = [decode(until_end(ids, eos_id)) for ids in outputs]
    return sum(text == answer for text, answer in zip(texts, answers)) / len(answers)


def case_ignored(outputs, answers, decode, eos_id):
    """You forgive capital letters; exact means exact."""
    return match_rate(
        outputs, answers, decode, eos_id, lambda text, answer: text.lower() == answer.lower()
    )


def only_finished(outputs, answers, decode, eos_id):
    """Outputs that never ended are left out of your count, so a model that rambles looks better."""
    pairs = [(ids, a) for ids, a in zip(outputs, answers) if eos_id in ids]
    if not pairs:
        return 0.0
    return exact_match(*map(list, zip(*pairs)), decode, eos_id)


def unfinished_is_wrong(outputs, answers, decode, eos_id):
    """You count every output without an end token as wrong; here it counts as it stands."""
    pairs = [([] if eos_id not in ids else ids, a) for ids, a in zip(outputs, answers)]
    return exact_match([ids for ids, _ in pairs], answers, decode, eos_id)


EXACT_MATCH = Exercise(
    solution=exact_match,
    cases=exact_match_cases,
    run=run_exact_match,
    title="Measure answers honestly",
    difficulty=2,
    importance=4,
    minutes=10,
    statement="""
The loss says how likely the right answer was; exact match says how often the model gave it. It is the
strictest measure there is and the easiest to get subtly wrong, always in the model's favour.

An output is a list of ids. It may go on after `<|im_end|>` (rows of a batch stop at different times), it
may never reach one, it may be empty.
""",
    hints=[
        "Three steps for each output: cut, decode, compare.",
        "`list.index` finds the first occurrence, and raises if there is none.",
    ],
    mistakes=[not_cut, cut_at_the_last_end, answer_inside, answer_at_the_start, text_inside,
              spaces_matter, case_ignored, only_finished, unfinished_is_wrong],
    discussion="Test every measure with a model that says nothing and one that says everything.",
)  # fmt: skip


# 4. The chat mask


def chat_labels(
    tokenizer: Tokenizer, messages: list[dict[str, str]], max_length: int
) -> tuple[list[int], list[int]]:
    """Encode a conversation and mark what is trained.

    Template: `<|im_start|>role\\ncontent<|im_end|>\\n` for each message, the text parts encoded one by
    one. Trained are the content and the `<|im_end|>` of every assistant turn.

    Args:
        tokenizer: use `.encode(text)`, `.bos_id` (of `<|im_start|>`), `.eos_id` (of `<|im_end|>`).
        max_length: both lists are cut to it, at the end.

    Returns:
        (input_ids, labels), equally long; a label is the id itself, or -100. Not shifted.
    """
    ### BEGIN SOLUTION
    input_ids, labels = [], []
    for message in messages:
        header = [tokenizer.bos_id, *tokenizer.encode(message["role"] + "\n")]
        body = [*tokenizer.encode(message["content"]), tokenizer.eos_id]
        tail = tokenizer.encode("\n")
        trained = body if message["role"] == "assistant" else [-100] * len(body)
        input_ids += header + body + tail
        labels += [-100] * len(header) + trained + [-100] * len(tail)
    return input_ids[:max_length], labels[:max_length]
    ### END SOLUTION


def chat_labels_cases(seed: int) -> list[tuple]:
    def chat(*turns: str) -> list[dict[str, str]]:
        roles = {"s": "system", "u": "user", "a": "assistant"}
        return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]

    name = random.Random(seed).choice(["Quin", "Molla"])
    two_turns = chat("u:Hello!", f"a:I am {name}.", "u:37+9=", "a:46.")
    return [
        (chat(f"u:Who is {name}?", f"a:{name} is a baker."), 100),
        (two_turns, 100),
        (two_turns, 31),  # cut inside the last answer
        (chat("s:Answer in one short sentence.", "u:assistant\nHello!", "a:Hello!"), 100),
        (chat("u:The pet of Molla is cat.", "a:The pet of Molla is cat.", "u:Hello!"), 100),
    ]


def run_chat_labels(function, messages, max_length):
    return function(toy_tokenizer(), messages, max_length)


def parts(tokenizer, message):
    header = [tokenizer.bos_id, *tokenizer.encode(message["role"] + "\n")]
    body = [*tokenizer.encode(message["content"]), tokenizer.eos_id]
    return header, body, tokenizer.encode("\n")


def label_with(tokenizer, messages, max_length, marks):
    """Encode; `marks(message, is_last, header, body, tail)` says which of a turn's ids are
    trained."""
    input_ids, labels = [], []
    for number, message in enumerate(messages, start=1):
        header, body, tail = parts(tokenizer, message)
        ids = header + body + tail
        trained = marks(message, number == len(messages), len(header), len(body), len(tail))
        input_ids += ids
        labels += [i if mark else -100 for i, mark in zip(ids, trained)]
    return input_ids[:max_length], labels[:max_length]


def is_answer(message):
    return message["role"] == "assistant"


def everything_trained(tokenizer, messages, max_length):
    """You train on the user's words too: the model would learn to ask its own questions."""
    marks = lambda message, last, h, b, t: [1] * (h + b + t)  # noqa: E731
    return label_with(tokenizer, messages, max_length, marks)


def only_last_turn(tokenizer, messages, max_length):
    """You train only the end of the conversation; every answer in it is worth learning from."""
    marks = lambda m, last, h, b, t: [0] * h + [is_answer(m) and last] * b + [0] * t  # noqa: E731
    return label_with(tokenizer, messages, max_length, marks)


def header_trained(tokenizer, messages, max_length):
    """You train the assistant's header; the template writes that, never the model."""
    marks = lambda m, last, h, b, t: [is_answer(m)] * (h + b) + [0] * t  # noqa: E731
    return label_with(tokenizer, messages, max_length, marks)


def end_not_trained(tokenizer, messages, max_length):
    """Your model never learns to stop."""
    marks = lambda m, last, h, b, t: [0] * h + [is_answer(m)] * (b - 1) + [0] * (1 + t)  # noqa: E731
    return label_with(tokenizer, messages, max_length, marks)


def newline_trained(tokenizer, messages, max_length):
    """You train what comes after the end of the turn; by then the model has stopped."""
    marks = lambda m, last, h, b, t: [0] * h + [is_answer(m)] * (b + t)  # noqa: E731
    return label_with(tokenizer, messages, max_length, marks)


def first_token_lost(tokenizer, messages, max_length):
    """The first token of each answer is not trained, and it decides how the answer goes on."""
    marks = lambda m, last, h, b, t: [0] * (h + 1) + [is_answer(m)] * (b - 1) + [0] * t  # noqa: E731
    return label_with(tokenizer, messages, max_length, marks)


def every_end_trained(tokenizer, messages, max_length):
    """You train the end of the user's turns as well, which the user writes."""
    marks = (  # noqa: E731
        lambda m, last, h, b, t: [0] * h + [is_answer(m)] * (b - 1) + [1] + [0] * t
    )
    return label_with(tokenizer, messages, max_length, marks)


def shifted_here(tokenizer, messages, max_length):
    """You shift the labels here, and the loss will shift them a second time."""
    input_ids, labels = chat_labels(tokenizer, messages, max_length)
    return input_ids, [*labels[1:], -100]


def labels_not_cut(tokenizer, messages, max_length):
    """Only one of your two lists is cut, so they no longer fit together."""
    return chat_labels(tokenizer, messages, max_length)[0], chat_labels(tokenizer, messages, 9999)[
        1
    ]


def cut_at_the_front(tokenizer, messages, max_length):
    """You keep the end of a conversation that is too long; what is asked for is its beginning."""
    input_ids, labels = chat_labels(tokenizer, messages, 9999)
    return input_ids[-max_length:], labels[-max_length:]


def mask_slides(tokenizer, messages, max_length):
    """After cutting, your labels no longer stand under their tokens: the two lists were cut at
    different ends."""
    input_ids, labels = chat_labels(tokenizer, messages, 9999)
    return input_ids[:max_length], labels[-max_length:]


def answer_searched(tokenizer, messages, max_length):
    """You search for the answer's ids and mark the first place they stand; the user may have said
    the same before."""
    input_ids = [i for message in messages for part in parts(tokenizer, message) for i in part]
    labels = [-100] * len(input_ids)
    for message in filter(is_answer, messages):
        _, body, _ = parts(tokenizer, message)
        size = len(body)
        start = next(i for i in range(len(input_ids)) if input_ids[i : i + size] == body)
        labels[start : start + size] = body
    return input_ids[:max_length], labels[:max_length]


CHAT_LABELS = Exercise(
    solution=chat_labels,
    cases=chat_labels_cases,
    run=run_chat_labels,
    title="Mark what the assistant says",
    difficulty=3,
    importance=5,
    minutes=20,
    statement="""
SFT is pretraining with a mask: the model reads the whole conversation and is marked only on what the
assistant says. In the course's format,

```
<|im_start|>user
Hello!<|im_end|>
<|im_start|>assistant
I am Quin.<|im_end|>
```

exactly `I am Quin.` and the `<|im_end|>` after it are trained. In a conversation of several turns, every
assistant turn is. Build ids and labels **together**, turn by turn, and most traps are gone.
""",
    hints=[
        "Cut a turn into three parts: what the template writes before, what is said, what follows.",
        "For every part you append ids, append as many labels. Which part is trained, and when?",
        "header: `<|im_start|>`, role, line break. body: content, `<|im_end|>`. tail: line break. Only "
        "the body of an assistant turn keeps its ids as labels.",
    ],
    mistakes=[everything_trained, only_last_turn, header_trained, end_not_trained, newline_trained,
              first_token_lost, every_end_trained, shifted_here, labels_not_cut, cut_at_the_front,
              mask_slides, answer_searched],
    discussion="`minimind.stages.sft.chat_labels` is this function.",
)  # fmt: skip


# 5. Open-ended: batches of like length


def make_batches(lengths: list[int], batch_size: int, seed: int) -> list[list[int]]:
    """Return the batches of one epoch as lists of row numbers.

    Every row is in exactly one batch; no batch is larger than `batch_size`, and there are no more
    batches than needed. Little padding, and as random as possible. The same seed gives the same
    batches.
    """
    ### BEGIN SOLUTION
    draw = random.Random(seed)
    rows = list(range(len(lengths)))
    draw.shuffle(rows)
    batches, window = [], 10 * batch_size
    for start in range(0, len(rows), window):
        alike = sorted(rows[start : start + window], key=lengths.__getitem__)
        batches += [alike[i : i + batch_size] for i in range(0, len(alike), batch_size)]
    draw.shuffle(batches)
    return batches
    ### END SOLUTION


def make_batches_cases(seed: int) -> list[tuple]:
    draw = random.Random(seed)
    return [([draw.randint(5, 120) for _ in range(1290)], 16)]


def run_make_batches(function, lengths, batch_size):
    one, again, other = (function(lengths, batch_size, seed) for seed in (3, 3, 4))
    return {"one": one, "again": again, "other": other}


def judge_make_batches(cases: list[tuple], results: list[dict]) -> str | None:
    (lengths, batch_size), result = cases[0], results[0]
    batches = result["one"]
    used = [row for batch in batches for row in batch]
    if sorted(used) != list(range(len(lengths))):
        lost = len(lengths) - len(used)
        if 0 < lost < batch_size and len(set(used)) == len(used):
            return sentence(rest_dropped)
        return f"Each of the {len(lengths)} row numbers must stand in exactly one batch."
    if max(map(len, batches)) > batch_size:
        return f"A batch holds {max(map(len, batches))} rows; {batch_size} are allowed."
    needed = -(-len(lengths) // batch_size)
    if len(batches) > needed:
        return f"{needed} batches are enough; you make {len(batches)}."
    if result["one"] != result["again"]:
        return sentence(seed_not_used)
    share = padding_share(lengths, batches)
    if share > 0.15:
        return sentence(only_shuffled) + f" Your padding: {share:.0%}; stay below 15%."
    means = [sum(lengths[row] for row in batch) / len(batch) for batch in batches]
    if abs(rank_correlation(means)) > 0.5:
        return sentence(short_to_long)
    same = {frozenset(b) for b in batches} & {frozenset(b) for b in result["other"]}
    return sentence(same_company) if len(same) > len(batches) / 4 else None


def rank_correlation(values: list[float]) -> float:
    """Return Spearman's correlation of values with their place in the list."""
    n = len(values)
    ranks = {place: rank for rank, place in enumerate(sorted(range(n), key=values.__getitem__))}
    return 1 - 6 * sum((ranks[i] - i) ** 2 for i in range(n)) / (n * (n * n - 1))


def chunks(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def only_shuffled(lengths, batch_size, seed):
    """Long and short rows share your batches, so most of what is computed is padding."""
    rows = list(range(len(lengths)))
    random.Random(seed).shuffle(rows)
    return chunks(rows, batch_size)


def short_to_long(lengths, batch_size, seed):
    """Your epoch runs from one end of the lengths to the other: for a while the model sees nothing
    but short answers."""
    rows = list(range(len(lengths)))
    random.Random(seed).shuffle(rows)
    return chunks(sorted(rows, key=lengths.__getitem__), batch_size)


def same_company(lengths, batch_size, seed):
    """The same rows share a batch in every epoch: only the order of your batches depends on the
    seed."""
    batches = chunks(sorted(range(len(lengths)), key=lengths.__getitem__), batch_size)
    random.Random(seed).shuffle(batches)
    return batches


def rest_dropped(lengths, batch_size, seed):
    """The rows that do not fill a batch are lost; a smaller batch is allowed."""
    return [batch for batch in make_batches(lengths, batch_size, seed) if len(batch) == batch_size]


def seed_not_used(lengths, batch_size, seed):
    """Asked twice with one seed you answer differently, so no run could be repeated or resumed."""
    return make_batches(lengths, batch_size, random.randrange(10**9))


MAKE_BATCHES = Exercise(
    solution=make_batches,
    cases=make_batches_cases,
    run=run_make_batches,
    judge=judge_make_batches,
    title="Batches of like length (open-ended)",
    difficulty=4,
    importance=3,
    minutes=30,
    statement="""
Sort all rows by length and there is hardly any padding, but also no chance: short rows first, the same
rows always together. Shuffle everything and half the work is padding. Find something in between.

The check measures what you return for 1,290 rows in batches of 16: every row once, at most 15% padding
(a plain shuffle has more than 40%), reproducible from the seed, no drift from short to long within the
epoch, and other company for the rows with another seed.

Then plot padding against the amount of chance in your method. Where is the knee? What changes when the
loss is a mean over *tokens* and long batches hold more of them?
""",
    hints=[
        "Sort only among some of the rows at a time.",
        "Shuffle, take windows of several batches, sort inside each window, cut it, and at the end "
        "shuffle the batches.",
    ],
    mistakes=[only_shuffled, short_to_long, same_company, rest_dropped, seed_not_used],
    discussion="`minimind.data.batch_order` does it with windows of 50 batches. Use a `random.Random(seed)` "
    "of your own: then nothing else in the program can change the order.",
)  # fmt: skip

EXERCISES = [TRAINED_PAIRS, PADDING_SHARE, EXACT_MATCH, CHAT_LABELS, MAKE_BATCHES]
