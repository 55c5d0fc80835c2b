"""Exercises 04: the next-token loss, the schedule, packing, accumulation, bits per byte."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from checks import Exercise, sentence
from torch import Tensor

TITLE = "Pretraining"
PRACTISES = (
    "the next-token loss with its shift and its mask, the learning-rate schedule, packing documents, "
    "accumulating gradients exactly, comparing models across tokenizers."
)


def numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# 1. The loss


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log p(label[t+1] | tokens up to t) over the labels that are not -100.

    Args:
        logits: (B, T, V).
        labels: (B, T), aligned with the input ids; -100 marks what is not counted.

    Returns:
        A scalar; 0, still connected to the logits, if no label is left.
    """
    ### BEGIN SOLUTION
    predictions = logits[:, :-1].flatten(0, 1)  # (B·(T-1), V)
    targets = labels[:, 1:].flatten()
    total = F.cross_entropy(predictions, targets, ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)
    ### END SOLUTION


def next_token_loss_cases(seed: int) -> list[tuple]:
    g = numbers(seed)
    cases = []
    for B, T, V in [(1, 4, 3), (3, 6, 5), (2, 5, 7)]:
        logits = torch.randn(B, T, V, generator=g) * 2
        labels = torch.randint(0, V, (B, T), generator=g)
        cases.append((logits, labels))
    cases[1][1][0, 4:] = -100  # padding
    cases[1][1][1, :3] = -100  # a prompt
    cases[2][1][:] = -100  # nothing is left
    return cases


def run_with_gradient(function, logits, labels):
    """Compare the gradient too: a loss can have the right value and teach nothing."""
    logits = logits.clone().requires_grad_()
    loss = function(logits, labels)
    connected = isinstance(loss, Tensor) and loss.requires_grad
    if connected:
        loss.backward()
    return {"loss": loss, "requires_grad": connected, "gradient": logits.grad}


def cross_entropy(logits, labels, **options):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, **options)


def total_loss(logits, labels):
    return cross_entropy(logits[:, :-1], labels[:, 1:], reduction="sum")


def counted(labels):
    return (labels != -100).sum().clamp(min=1)


def not_shifted(logits, labels):
    """You ask every position for the token that it has just read; it is to guess the next one."""
    return cross_entropy(logits, labels, reduction="sum") / counted(labels)


def shifted_backwards(logits, labels):
    """You shift the wrong way: every position is asked for the token before it."""
    return cross_entropy(logits[:, 1:], labels[:, :-1], reduction="sum") / counted(labels[:, :-1])


def padding_in_the_mean(logits, labels):
    """You divide by all positions, so padding makes the loss look better than it is."""
    return total_loss(logits, labels) / labels[:, 1:].numel()


def counted_before_shift(logits, labels):
    """Your sum and your count are not over the same labels: the first of a row is counted but
    nobody guesses it."""
    return total_loss(logits, labels) / counted(labels)


def mean_of_rows(logits, labels):
    """You average each row first, so a token in a short row weighs more than one in a long row."""
    rows = zip(logits, labels)
    means = [total_loss(x[None], y[None]) / counted(y[1:]) for x, y in rows]
    return torch.stack(means).mean()


def summed(logits, labels):
    """You return the sum; twice the batch would mean twice the step."""
    return total_loss(logits, labels)


def nan_when_empty(logits, labels):
    """A batch without any label gives 0/0, and one NaN is enough to ruin all weights."""
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def cut_off_when_empty(logits, labels):
    """Your zero for an empty batch hangs in the air: `backward()` needs a way back to the logits."""
    if (labels[:, 1:] == -100).all():
        return torch.tensor(0.0)
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def ignored_become_zero(logits, labels):
    """You turn -100 into token 0, so the model learns to predict that token wherever it was to
    learn nothing."""
    return cross_entropy(logits[:, :-1], labels[:, 1:].clamp(min=0))


def in_bits(logits, labels):
    """You use another logarithm; losses are in nats, the natural one."""
    return total_loss(logits, labels) / counted(labels[:, 1:]) / math.log(2)


NEXT_TOKEN_LOSS = Exercise(
    solution=next_token_loss,
    cases=next_token_loss_cases,
    run=run_with_gradient,
    title="The loss",
    difficulty=2,
    importance=5,
    minutes=20,
    statement=r"""
One number drives all of pretraining and half of what comes after:

$$-\frac{1}{N} \sum_{t:\,\text{label}_{t+1} \neq -100} \log p(\text{label}_{t+1} \mid \text{tokens up to } t)$$

Logits at position $t$ are a guess at token $t+1$. The labels come **aligned** with the input ids, so
the shift is yours to make. $N$ is the number of labels in the sum.

**Before you write:** a batch may have no label at all, for instance when every answer was cut off.
What should the loss be then, and what its gradient?
""",
    hints=[
        "Write the ids of a text of four tokens in a row, and below each the token it has to guess.",
        "The last position has nothing to guess, the first token is guessed by nobody.",
        "Sum with `reduction='sum'` and divide by a count that is at least 1.",
    ],
    mistakes=[not_shifted, shifted_backwards, padding_in_the_mean, counted_before_shift,
              mean_of_rows, summed, nan_when_empty, cut_off_when_empty, ignored_become_zero,
              in_bits],
    discussion="A model that knows nothing gives every token 1/V, a loss of ln V. If yours starts far "
    "from that, look for the bug before you look at anything else.",
)  # fmt: skip


# 2. The schedule


def schedule(step: int, total_steps: int, peak: float, warmup_steps: int) -> float:
    """Return the learning rate of a step (0 ≤ step ≤ total_steps).

    peak · (0.1 + 0.45·(1 + cos(π·step/total_steps))), times (step + 1)/warmup_steps as long as that
    is below 1. `warmup_steps` may be 0: no warm-up.
    """
    ### BEGIN SOLUTION
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return peak * warmup * (0.1 + 0.45 * (1 + math.cos(math.pi * step / total_steps)))
    ### END SOLUTION


def schedule_cases(seed: int) -> list[tuple]:
    total = 100 + seed
    no_warmup = [(step, total, 2e-3, 0) for step in (0, 1, total // 2, total - 1, total)]
    return no_warmup + [(step, total, 3e-4, 8) for step in (0, 3, 7, 8, 60, total)]


def fraction(step, total):
    return 0.1 + 0.45 * (1 + math.cos(math.pi * step / total))


def ramp(step, warmup_steps):
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def starts_above_peak(step, total_steps, peak, warmup_steps):
    """You start at 1.1 times the peak: a tenth is added to a cosine that already reaches 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / total_steps))
    return peak * ramp(step, warmup_steps) * (0.1 + cosine)


def ends_at_zero(step, total_steps, peak, warmup_steps):
    """Your rate falls to zero; here the last steps still learn, at a tenth of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / total_steps))
    return peak * ramp(step, warmup_steps) * cosine


def full_circle(step, total_steps, peak, warmup_steps):
    """Your cosine goes all the way round: the rate falls until half-time and then rises again."""
    return peak * ramp(step, warmup_steps) * fraction(2 * step, total_steps)


def straight_line(step, total_steps, peak, warmup_steps):
    """Both ends are right, but you walk between them in a straight line."""
    return peak * ramp(step, warmup_steps) * (1 - 0.9 * step / total_steps)


def in_degrees(step, total_steps, peak, warmup_steps):
    """Your angle is in degrees; `math.cos` takes radians."""
    cosine = math.cos(180 * step / total_steps)
    return peak * ramp(step, warmup_steps) * (0.1 + 0.45 * (1 + cosine))


def first_step_wasted(step, total_steps, peak, warmup_steps):
    """Your warm-up starts at exactly zero, so the first batch is computed and teaches nothing."""
    warmup = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return peak * warmup * fraction(step, total_steps)


def cosine_after_warmup(step, total_steps, peak, warmup_steps):
    """You begin the cosine when the warm-up ends; here both run from step 0 and are multiplied."""
    if step < warmup_steps:
        return peak * ramp(step, warmup_steps)
    return peak * fraction(step - warmup_steps, total_steps - warmup_steps)


def no_warmup(step, total_steps, peak, warmup_steps):
    """The cosine is right, the warm-up is missing."""
    return peak * fraction(step, total_steps)


SCHEDULE = Exercise(
    solution=schedule,
    cases=schedule_cases,
    title="The schedule",
    difficulty=1,
    importance=3,
    minutes=10,
    statement=r"""
$$\text{lr}(s) = \text{peak} \cdot \left(0.1 + 0.45\,\left(1 + \cos\frac{\pi s}{S}\right)\right)
\cdot \min\left(1, \frac{s + 1}{\text{warm-up}}\right)$$

Large steps first, small ones at the end, and a gentle start while the optimizer's averages are still
empty. Check both ends on paper before you run it: what is lr(0) and what is lr(S) without warm-up?
""",
    hints=[
        "cos runs from 1 to -1. What does the bracket run through?",
        "0.1 + 0.45·2 = 1 and 0.1 + 0.45·0 = 0.1. Take care of `warmup_steps = 0`.",
    ],
    mistakes=[starts_above_peak, ends_at_zero, full_circle, straight_line, in_degrees,
              first_step_wasted, cosine_after_warmup, no_warmup],
    discussion="After a resume the step must go on counting, or the rate jumps back up.",
)  # fmt: skip


# 3. Packing


def pack(documents: list[list[int]], block: int, end_id: int) -> list[list[int]]:
    """Join documents and cut the stream into blocks without padding.

    Put `end_id` after every document, join all, and cut blocks of `block` tokens. Each block starts
    with the last token of the one before, so that with the usual shift every token of the stream but
    the very first is predicted exactly once. A rest that does not fill a block is left out.
    """
    ### BEGIN SOLUTION
    stream = [token for document in documents for token in [*document, end_id]]
    starts = range(0, len(stream) - block + 1, block - 1)
    return [stream[start : start + block] for start in starts]
    ### END SOLUTION


def pack_cases(seed: int) -> list[tuple]:
    draw = random.Random(seed)
    drawn = [[draw.randint(1, 99) for _ in range(draw.randint(1, 9))] for _ in range(8)]
    return [
        ([[1, 2, 3], [4, 5]], 3, 0),  # the stream just fills its blocks
        ([[1, 2, 3, 4], [5], [6, 7]], 4, 0),  # one block ends exactly with the stream
        ([[1, 2, 3, 4, 5, 6], [7, 8, 9]], 5, 0),
        (drawn, 6, 0),
        ([[1, 2]], 8, 0),  # too short for a block
    ]


def joined(documents, end_id):
    return [token for document in documents for token in [*document, end_id]]


def cut(stream, block):
    return [stream[i : i + block] for i in range(0, len(stream) - block + 1, block - 1)]


def no_overlap(documents, block, end_id):
    """Your blocks do not share a token, so the first token of each block is never predicted."""
    stream = joined(documents, end_id)
    return [stream[i : i + block] for i in range(0, len(stream) - block + 1, block)]


def end_in_front(documents, block, end_id):
    """You put the end token in front of each document; the model must learn where a text ends."""
    return cut([token for document in documents for token in [end_id, *document]], block)


def no_end(documents, block, end_id):
    """Your documents run into each other; nothing tells the model that a new one begins."""
    return cut([token for document in documents for token in document], block)


def each_document_alone(documents, block, end_id):
    """You cut every document for itself and lose a rest each time; join first, then cut."""
    return [part for document in documents for part in cut([*document, end_id], block)]


def rest_kept(documents, block, end_id):
    """Your last block is shorter than the others, so they cannot be stacked into a tensor."""
    stream = joined(documents, end_id)
    return [stream[i : i + block] for i in range(0, len(stream) - 1, block - 1)]


def rest_padded(documents, block, end_id):
    """You fill the last block up, and the model would train on that filling."""
    return [part + [end_id] * (block - len(part)) for part in rest_kept(documents, block, end_id)]


def last_block_lost(documents, block, end_id):
    """When the stream just fills its last block, you lose that block: is the last document's end
    in the stream, and does your range reach far enough?"""
    stream = joined(documents, end_id)
    return [stream[i : i + block] for i in range(0, len(stream) - block, block - 1)]


def sliding_window(documents, block, end_id):
    """Your blocks move on by one token at a time: every token is predicted many times over."""
    stream = joined(documents, end_id)
    return [stream[i : i + block] for i in range(len(stream) - block + 1)]


PACK = Exercise(
    solution=pack,
    cases=pack_cases,
    title="Pack documents into blocks",
    difficulty=2,
    importance=4,
    minutes=15,
    statement="""
Documents have all lengths; a batch wants one. Padding would waste most of the computation, so
pretraining joins everything into one stream and cuts it.

`pack([[1, 2, 3], [4, 5]], block=3, end_id=0)` has the stream `1 2 3 0 4 5 0` and gives
`[[1, 2, 3], [3, 0, 4], [4, 5, 0]]`. Why does 3 stand there twice? Because of the shift: a block of three
tokens makes two predictions. In the first block 3 is something to be guessed, in the second it is what
the guess at 0 is based on.
""",
    hints=[
        "How far apart do two blocks start if they share one token?",
        "`range(start, stop, step)` with the step `block - 1`. Which start is the last that still has "
        "`block` tokens after it?",
    ],
    mistakes=[no_overlap, end_in_front, no_end, each_document_alone, rest_kept, rest_padded,
              last_block_lost, sliding_window],
    discussion="`minimind.data.pack` does the same lazily. Documents of one block can see each other; at "
    "this size that does no measurable harm, and large models mask it.",
)  # fmt: skip


# 4. Accumulation


def accumulate(mean_loss: Callable[[dict], Tensor], batches: list[dict]) -> float:
    """Leave the gradient of the one big batch, computed on one small batch at a time.

    Args:
        mean_loss: batch to its next-token loss, a mean over the labels that count: those of
            `batch["labels"][:, 1:]` that are not -100.
        batches: dicts with "labels" (B, T) and what else `mean_loss` needs. They differ in size.

    Returns:
        The mean loss over all labels of all batches. Afterwards the parameters' `.grad` is the
        gradient of exactly that mean. At least one label counts.
    """
    ### BEGIN SOLUTION
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    mean = 0.0
    for batch, count in zip(batches, counts):
        loss = mean_loss(batch) * count / sum(counts)
        loss.backward()  # adds to .grad, and frees this batch's memory
        mean += loss.item()
    return mean
    ### END SOLUTION


def accumulate_cases(seed: int) -> list[tuple]:
    g = numbers(seed)
    cases = []
    for shapes in ([(2, 4), (2, 4)], [(3, 5), (2, 3), (4, 6)]):
        batches = []
        for B, T in shapes:
            labels = torch.randint(0, 5, (B, T), generator=g)
            labels[0, 2:] = -100
            batches.append({"inputs": torch.randn(B, T, 3, generator=g), "labels": labels})
        cases.append((torch.randn(3, 5, generator=g), batches))
    cases[1][1][1]["labels"][:] = -100  # one batch without any label
    return cases


def run_accumulate(function, weight, batches):
    weight = weight.clone().requires_grad_()
    mean = function(
        lambda batch: next_token_loss(batch["inputs"] @ weight, batch["labels"]), batches
    )
    return {"loss": mean, "gradient": weight.grad}


def weighted(mean_loss, batches, shares):
    mean = 0.0
    for batch, share in zip(batches, shares):
        loss = mean_loss(batch) * share
        loss.backward()
        mean += loss.item()
    return mean


def shares_by(batches, count):
    counts = [count(batch) for batch in batches]
    return [c / sum(counts) for c in counts]


def mean_of_means(mean_loss, batches):
    """You take the mean of the means, so a token in a batch with few labels weighs more than the
    others."""
    return weighted(mean_loss, batches, [1 / len(batches)] * len(batches))


def sum_of_means(mean_loss, batches):
    """You add up means and never divide: more batches make a larger step."""
    return weighted(mean_loss, batches, [1.0] * len(batches))


def weighted_by_rows(mean_loss, batches):
    """You weigh by rows, but a row may hold one label or a hundred."""
    return weighted(mean_loss, batches, shares_by(batches, lambda b: len(b["labels"])))


def weighted_by_positions(mean_loss, batches):
    """You weigh by positions, padding and prompts included; only what is counted in the loss has
    weight."""
    return weighted(mean_loss, batches, shares_by(batches, lambda b: b["labels"][:, 1:].numel()))


def weighted_before_shift(mean_loss, batches):
    """Your counts include the first label of every row, which the loss leaves out."""
    return weighted(
        mean_loss, batches, shares_by(batches, lambda b: int((b["labels"] != -100).sum()))
    )


def summed_not_averaged(mean_loss, batches):
    """You weigh each batch by its labels but never divide by all of them together."""
    counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    return weighted(mean_loss, batches, counts)


def last_batch_only(mean_loss, batches):
    """Only the last batch reaches `backward()`; the loss you return is right, the gradient is not."""
    shares = shares_by(batches, lambda b: int((b["labels"][:, 1:] != -100).sum()))
    losses = [mean_loss(b) * share for b, share in zip(batches, shares)]
    losses[-1].backward()
    return sum(loss.item() for loss in losses)


def no_backward(mean_loss, batches):
    """The loss is right, but no gradient was computed at all."""
    shares = shares_by(batches, lambda b: int((b["labels"][:, 1:] != -100).sum()))
    return sum(mean_loss(b).item() * share for b, share in zip(batches, shares))


ACCUMULATE = Exercise(
    solution=accumulate,
    cases=accumulate_cases,
    run=run_accumulate,
    title="Accumulate gradients exactly",
    difficulty=3,
    importance=5,
    minutes=20,
    statement="""
Memory holds a batch of 8, you want one of 64: run 8 small ones and add up their gradients. The promise
is that nobody can tell the difference. Well-known training codes broke it for years, because their
batches had different numbers of labels.

Call `backward()` on every small batch at once (so that its memory is freed), scaled such that the sum
is the gradient of the one big batch.
""",
    hints=[
        "Two batches: 1 label with loss 4, and 3 labels with loss 0 each. What is the mean over all?",
        "A mean times its count is a sum. Sums may be added.",
        "Count first, over all batches, after the shift. Then each batch's share is count / total.",
    ],
    mistakes=[mean_of_means, sum_of_means, weighted_by_rows, weighted_by_positions,
              weighted_before_shift, summed_not_averaged, last_batch_only, no_backward],
    discussion="The same sum goes wrong again when several GPUs average their gradients: there too the "
    "total number of labels must be known before anybody divides.",
)  # fmt: skip


# 5. Open-ended: compare across tokenizers


def compare_tokenizers(
    train_text: str, heldout: str, tokenizers: dict[str, Callable[[str], list[str]]]
) -> dict[str, dict[str, float]]:
    """Train a model on the tokens of each tokenizer and measure it in two units.

    The model counts: p(b | a) = (count(a, b) + 0.1) / (count(a) + 0.1·V), where a and b are
    neighbours in the training text, count(a) is how often `a` has a right neighbour there, and V is
    the number of different tokens in the training text plus one, for all that it has never seen.

    Returns:
        By tokenizer {"loss": nats per predicted token, "bits_per_byte": ...} on `heldout`. The first
        token is not predicted; bits_per_byte divides by the UTF-8 bytes of the tokens that are.
    """
    ### BEGIN SOLUTION
    result = {}
    for name, tokenize in tokenizers.items():
        seen, tokens = tokenize(train_text), tokenize(heldout)
        pairs, firsts = Counter(zip(seen, seen[1:])), Counter(seen[:-1])
        V = len(set(seen)) + 1
        nats = [
            -math.log((pairs[a, b] + 0.1) / (firsts[a] + 0.1 * V))
            for a, b in zip(tokens, tokens[1:])
        ]
        size = len("".join(tokens[1:]).encode("utf-8"))
        result[name] = {
            "loss": sum(nats) / len(nats),
            "bits_per_byte": sum(nats) / math.log(2) / size,
        }
    return result
    ### END SOLUTION


def by_letters(text: str) -> list[str]:
    return list(text)


def by_pairs(text: str) -> list[str]:
    return [text[i : i + 2] for i in range(0, len(text), 2)]


def by_words(text: str) -> list[str]:
    words = text.split(" ")
    return [words[0], *(" " + word for word in words[1:])]


TOKENIZERS = {"letters": by_letters, "pairs": by_pairs, "words": by_words}


def compare_tokenizers_cases(seed: int) -> list[tuple]:
    draw = random.Random(seed)
    names = [
        "Quin",
        "Molla",
        "Takko",
        "Bakko",
        "Rudi",
        "Jonek",
        "Stumar",
        "Gorin",
        "小红",
        "Cladel",
    ]
    things = ["ribbon", "tent", "anchor", "key", "vase", "tile", "kite", "lamp", "drum", "cup"]

    def text(count: int) -> str:
        return " ".join(
            f"{draw.choice(names)} {draw.choice(['took', 'lost', 'found'])} the {draw.choice(things)}"
            f" {draw.choice(['of', 'for', 'near'])} {draw.choice(names)}."
            for _ in range(count)
        )

    return [(text(600), text(60))]


def run_compare(function, train_text, heldout):
    return function(train_text, heldout, dict(TOKENIZERS))


def judge_compare(cases: list[tuple], results: list[dict]) -> str | None:
    (train, heldout), measured = cases[0], results[0]
    if list(measured) != list(TOKENIZERS):
        return f"The result needs the keys {list(TOKENIZERS)}; yours has {list(measured)}."
    right = compare_tokenizers(train, heldout, TOKENIZERS)
    for name, tokenize in TOKENIZERS.items():
        loss, bits = measured[name]["loss"], measured[name]["bits_per_byte"]
        tokens = tokenize(heldout)[1:]
        letters, size = len("".join(tokens)), len("".join(tokens).encode())
        if math.isclose(bits, loss * len(tokens) / size, rel_tol=1e-6):
            return sentence(still_in_nats)
        if (
            math.isclose(bits, loss / math.log(2) * len(tokens) / letters, rel_tol=1e-6)
            and letters < size
        ):
            return sentence(per_character)
        if not math.isclose(bits, loss / math.log(2) * len(tokens) / size, rel_tol=1e-3):
            return (
                f"For {name!r} the two numbers do not belong together: {loss:.4f} nats for each of "
                f"{len(tokens)} tokens, {size} bytes in all, are not {bits:.4f} bits per byte."
            )
        if not math.isclose(loss, right[name]["loss"], rel_tol=1e-3):
            return (
                f"For {name!r} the loss should be {right[name]['loss']:.4f}; yours is {loss:.4f}."
            )
    return None


def compare_with(train_text, heldout, tokenizers, unit, model_text=None):
    """The solution's losses with another unit, or with the counts of another text."""
    losses = compare_tokenizers(model_text or train_text, heldout, tokenizers)
    result = {}
    for name, tokenize in tokenizers.items():
        tokens, loss = tokenize(heldout)[1:], losses[name]["loss"]
        result[name] = {"loss": loss, "bits_per_byte": unit(loss * len(tokens), tokens)}
    return result


def size_of(tokens):
    return len("".join(tokens).encode())


def still_in_nats(train_text, heldout, tokenizers):
    """Your bits are nats: the natural logarithm counts in another unit."""
    return compare_with(train_text, heldout, tokenizers, lambda nats, t: nats / size_of(t))


def per_character(train_text, heldout, tokenizers):
    """You divide by characters; a byte is the unit that all texts and languages share."""
    return compare_with(
        train_text, heldout, tokenizers, lambda nats, t: nats / math.log(2) / len("".join(t))
    )


def per_token(train_text, heldout, tokenizers):
    """Your second number is the loss in bits per token; it still depends on how long the tokens
    are."""
    return compare_with(
        train_text, heldout, tokenizers, lambda nats, t: nats / math.log(2) / len(t)
    )


def trained_on_heldout(train_text, heldout, tokenizers):
    """Your model has counted the held-out text itself; nothing is measured on what one has trained
    on."""
    return compare_with(
        train_text, heldout, tokenizers, lambda nats, t: nats / math.log(2) / size_of(t), heldout
    )


COMPARE_TOKENIZERS = Exercise(
    solution=compare_tokenizers,
    cases=compare_tokenizers_cases,
    run=run_compare,
    judge=judge_compare,
    title="Which tokenizer is better? (open-ended)",
    difficulty=3,
    importance=4,
    minutes=30,
    statement="""
Two people train a model each. One reports a loss of 1.1, the other 1.6. Who is better? Nobody can
know, as long as one model guesses letters and the other guesses words: a word is a harder guess, and
there are fewer of them. **Bits per byte** is the number to compare: all the information the text cost,
over the bytes of the text. It is also the size to which the model could compress it, in bits.

Measure both units on a model you can train in milliseconds: it counts neighbours. **Predict first:**
which of letters, pairs of letters and words has the smallest loss, and which the fewest bits per byte?

When the check is content, try tokenizers of your own (a BPE of 500 tokens?), and another text. When do
words stop being the best?
""",
    hints=[
        "`Counter(zip(tokens, tokens[1:]))` counts neighbours; a Counter gives 0 for what it never saw.",
        "The sum of all nats is the whole cost. Loss divides it by tokens, bits per byte by ln 2 and by "
        "bytes.",
    ],
    mistakes=[still_in_nats, per_character, per_token, trained_on_heldout],
    discussion="""
On this text pairs have the smallest loss; letters and words have nearly the same one, and yet words
need about a fifth of the letters' bits per byte. A longer token sees further back, which helps a model
that looks at one neighbour only; but every word must have been seen, which needs much text. This is
why the course reports bits per byte wherever it can.
""",
)  # fmt: skip

EXERCISES = [NEXT_TOKEN_LOSS, SCHEDULE, PACK, ACCUMULATE, COMPARE_TOKENIZERS]
