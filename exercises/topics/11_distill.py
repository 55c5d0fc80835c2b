"""Exercises 11: softened probabilities, KL, the distillation loss, its gradient, a teacher on disk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from checks import Exercise
from torch import Tensor

TITLE = "Distillation"
PRACTISES = (
    "softening a distribution, KL in the right direction, the distillation loss with its mask and its "
    "T², its gradient by hand, keeping a teacher's opinions in a small file."
)


def numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# 1. Temperature


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Return softmax(logits / temperature) over the last axis.

    Args:
        logits: (N, V), of any size: 1,000 is a logit like any other.
        temperature: above 0; 1 leaves the model's own probabilities.
    """
    ### BEGIN SOLUTION
    scaled = logits / temperature
    weights = (scaled - scaled.max(-1, keepdim=True).values).exp()
    return weights / weights.sum(-1, keepdim=True)
    ### END SOLUTION


def soften_cases(seed: int) -> list[tuple]:
    g = numbers(seed)
    cases = [(3 * torch.randn(N, V, generator=g), T) for N, V, T in [(3, 5, 2.0), (4, 2, 0.5)]]
    large = torch.tensor([[1000.0, 999.0, 0.0], [-1000.0, -1001.0, -1000.5]])
    return [*cases, (large, 2.0)]


def multiplied(logits, temperature):
    """You multiply by the temperature, so heat makes your distribution sharper."""
    return (logits * temperature).softmax(-1)


def divided_afterwards(logits, temperature):
    """You divide the probabilities; they no longer sum to 1, and their ratios are as they were."""
    return logits.softmax(-1) / temperature


def root_not_normalised(logits, temperature):
    """The root of a probability is the right weight, but the weights must be made to sum to 1."""
    return logits.softmax(-1) ** (1 / temperature)


def logs_returned(logits, temperature):
    """You return logarithms; probabilities were asked for."""
    return (logits / temperature).log_softmax(-1)


def along_the_rows(logits, temperature):
    """You normalise over the positions: each row is a distribution, not each column."""
    return (logits / temperature).softmax(0)


def overflows(logits, temperature):
    """Your exponentials overflow (or all vanish) for logits of this size; only differences between
    logits matter, so take the largest away first."""
    weights = (logits / temperature).exp()
    return weights / weights.sum(-1, keepdim=True)


def linear_weights(logits, temperature):
    """You mix the distribution with a flat one; temperature changes the logits, before the softmax."""
    p = logits.softmax(-1)
    return p / temperature + (1 - 1 / temperature) / logits.shape[-1]


SOFTEN = Exercise(
    solution=soften,
    cases=soften_cases,
    title="Temperature",
    difficulty=1,
    importance=4,
    minutes=10,
    statement=r"""
A good teacher is nearly certain: 0.999 for one token and next to nothing for the rest, so that its
distribution looks like the one-hot label that the student has already. What the teacher knows about the
*wrong* answers is in the ratios of the tiny numbers. Temperature makes them visible:

$$p_i(T) = \frac{e^{z_i/T}}{\sum_j e^{z_j/T}}$$

Write it without `softmax`. **Before you run it:** what is left at $T \to 0$ and at $T \to \infty$?
""",
    hints=[
        "Divide first, then exponentiate, then make the row sum to 1.",
        "Adding the same number to all logits changes nothing: which number keeps exp() harmless?",
    ],
    mistakes=[multiplied, divided_afterwards, root_not_normalised, logs_returned, along_the_rows,
              overflows, linear_weights],
    discussion="At T → 0 the largest logit takes everything; at T → ∞ all V tokens are alike. In between "
    "the order of the tokens never changes, only how clearly it is said.",
)  # fmt: skip


# 2. How far is the student?


def soft_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher ‖ student) = Σ p·(log p - log q) in nats, both softened, mean over positions.

    Args:
        student_logits, teacher_logits: (N, V). The teacher is fixed: no gradient flows into it.
        temperature: softens both.
    """
    ### BEGIN SOLUTION
    log_p = F.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    ### END SOLUTION


def soft_kl_cases(seed: int) -> list[tuple]:
    g = numbers(seed)
    sizes = [(3, 5, 2.0), (4, 7, 1.0), (2, 9, 0.7)]
    return [
        (torch.randn(N, V, generator=g), 2 * torch.randn(N, V, generator=g), T) for N, V, T in sizes
    ]


def run_with_gradients(function, student_logits, teacher_logits, *more):
    """Compare the gradients of student and teacher too."""
    student, teacher = student_logits.requires_grad_(), teacher_logits.requires_grad_()
    loss = function(student, teacher, *more)
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()
    return {"loss": loss, "student": student.grad, "teacher": teacher.grad}


def logs(student_logits, teacher_logits, T):
    return (student_logits / T).log_softmax(-1), (teacher_logits.detach() / T).log_softmax(-1)


def other_way_round(student_logits, teacher_logits, temperature):
    """You weight by the student's probabilities: that is KL(student ‖ teacher), which lets the student
    ignore whatever it finds unlikely itself."""
    log_q, log_p = logs(student_logits, teacher_logits, temperature)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def negative(student_logits, teacher_logits, temperature):
    """Your sign is turned: KL is never negative, and less of it is better."""
    return -soft_kl(student_logits, teacher_logits, temperature)


def mean_of_everything(student_logits, teacher_logits, temperature):
    """You divide by the size of the vocabulary as well: sum over tokens, mean over positions."""
    return soft_kl(student_logits, teacher_logits, temperature) / student_logits.shape[-1]


def sum_of_positions(student_logits, teacher_logits, temperature):
    """You add up the positions, so that a longer text would pull harder."""
    return soft_kl(student_logits, teacher_logits, temperature) * len(student_logits)


def soft_cross_entropy(student_logits, teacher_logits, temperature):
    """That is the cross-entropy to the teacher. Its gradient is right, but it cannot fall to zero:
    the teacher's own entropy is still in it."""
    log_q, log_p = logs(student_logits, teacher_logits, temperature)
    return -(log_p.exp() * log_q).sum(-1).mean()


def student_not_softened(student_logits, teacher_logits, temperature):
    """You soften the teacher alone; the student would have to be lukewarm at temperature 1."""
    log_p = (teacher_logits.detach() / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - student_logits.log_softmax(-1))).sum(-1).mean()


def teacher_not_softened(student_logits, teacher_logits, temperature):
    """You soften the student alone; both must be seen in the same light."""
    log_p = teacher_logits.detach().log_softmax(-1)
    return (log_p.exp() * (log_p - (student_logits / temperature).log_softmax(-1))).sum(-1).mean()


def teacher_learns(student_logits, teacher_logits, temperature):
    """A gradient flows into your teacher, which would then come to meet its student."""
    log_p = (teacher_logits / temperature).log_softmax(-1)
    log_q = (student_logits / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def probabilities_for_logs(student_logits, teacher_logits, temperature):
    """`F.kl_div` expects the student's LOG-probabilities first; you hand it probabilities."""
    log_q, log_p = logs(student_logits, teacher_logits, temperature)
    return F.kl_div(log_q.exp(), log_p.exp(), reduction="batchmean")


SOFT_KL = Exercise(
    solution=soft_kl,
    cases=soft_kl_cases,
    run=run_with_gradients,
    title="How far is the student from its teacher?",
    difficulty=2,
    importance=5,
    minutes=15,
    statement=r"""
$$\mathrm{KL}(p \,\|\, q) = \sum_i p_i \,(\log p_i - \log q_i)$$

with the teacher's $p$ and the student's $q$, both at temperature $T$, is zero exactly where the two
agree. The weight in front decides who is asked: the *teacher* says which tokens matter. The check
looks at the gradients too.
""",
    hints=[
        "Stay in logarithms as long as you can: `log_softmax`.",
        "Three axes of choice: whose probabilities weigh, what is summed, what is averaged.",
        "`F.kl_div(input, target)` computes KL(target ‖ input): the student comes first, in logs.",
    ],
    mistakes=[other_way_round, negative, mean_of_everything, sum_of_positions, soft_cross_entropy,
              student_not_softened, teacher_not_softened, teacher_learns, probabilities_for_logs],
    discussion="`F.kl_div` has its arguments the other way round than the formula and averages over "
    "everything by default. Both have been shipped as bugs; write the sum out, or test it.",
)  # fmt: skip


# 3. The loss


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float, temperature: float
) -> Tensor:
    """Return alpha·CE + (1 - alpha)·T²·KL(teacher ‖ student), means over the labelled tokens.

    Args:
        student_logits, teacher_logits: (B, T, V); the teacher is fixed.
        labels: (B, T), aligned with the input ids: the shift is yours to make. -100 is not counted.
        alpha: weight of the cross-entropy, which is taken at temperature 1.
        temperature: softens both distributions of the KL.

    Returns:
        A scalar; 0, still connected to the student's logits, if no label is left.
    """
    ### BEGIN SOLUTION
    targets = labels[:, 1:]
    labelled = targets != -100
    student = student_logits[:, :-1][labelled]  # (N, V)
    teacher = teacher_logits[:, :-1][labelled].detach()
    count = labelled.sum().clamp(min=1)
    cross_entropy = F.cross_entropy(student, targets[labelled], reduction="sum") / count
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    log_q = F.log_softmax(student / temperature, dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum() / count
    return alpha * cross_entropy + (1 - alpha) * temperature**2 * kl
    ### END SOLUTION


def distillation_loss_cases(seed: int) -> list[tuple]:
    g = numbers(seed)
    cases = []
    for B, T, V, alpha, temperature in [
        (2, 6, 4, 0.3, 2.0),
        (3, 5, 7, 0.8, 3.0),
        (2, 4, 5, 0.4, 1.5),
    ]:
        student, teacher = (2 * torch.randn(B, T, V, generator=g) for _ in range(2))
        cases.append(
            (student, teacher, torch.randint(0, V, (B, T), generator=g), alpha, temperature)
        )
    cases[0][2][0, :4] = cases[1][2][1, 2:] = cases[1][2][2, :2] = -100
    cases[2][2][:] = -100  # nothing is left
    return cases


def two_terms(student_logits, teacher_logits, labels, T=1.0, soft_T=None, everywhere=False):
    """Return cross-entropy (logits over `soft_T`, if given) and KL, as the solution has them."""
    targets = labels[:, 1:]
    labelled = targets != -100
    student, count = student_logits[:, :-1][labelled], labelled.sum().clamp(min=1)
    hard = F.cross_entropy(student / (soft_T or 1), targets[labelled], reduction="sum") / count
    if everywhere:
        return hard, soft_kl(
            student_logits[:, :-1].flatten(0, 1), teacher_logits[:, :-1].flatten(0, 1), T
        )
    log_q, log_p = logs(student, teacher_logits[:, :-1][labelled], T)
    return hard, (log_p.exp() * (log_p - log_q)).sum() / count


def t_squared_forgotten(student_logits, teacher_logits, labels, alpha, temperature):
    """T² is missing: the hotter the softmax, the weaker the teacher's pull."""
    hard, soft = two_terms(student_logits, teacher_logits, labels, temperature)
    return alpha * hard + (1 - alpha) * soft


def t_once(student_logits, teacher_logits, labels, alpha, temperature):
    """One T is not enough: the gradient loses one through z/T, and one because p and q move together
    as both become flat."""
    hard, soft = two_terms(student_logits, teacher_logits, labels, temperature)
    return alpha * hard + (1 - alpha) * temperature * soft


def t_squared_on_both(student_logits, teacher_logits, labels, alpha, temperature):
    """Your T² scales the text's term as well, which was never softened."""
    hard, soft = two_terms(student_logits, teacher_logits, labels, temperature)
    return temperature**2 * (alpha * hard + (1 - alpha) * soft)


def alpha_swapped(student_logits, teacher_logits, labels, alpha, temperature):
    """Your alpha weighs the teacher; here it weighs the text."""
    return distillation_loss(student_logits, teacher_logits, labels, 1 - alpha, temperature)


def alpha_once(student_logits, teacher_logits, labels, alpha, temperature):
    """Only one of your terms is weighted; the weights must sum to 1."""
    hard, soft = two_terms(student_logits, teacher_logits, labels, temperature)
    return alpha * hard + temperature**2 * soft


def text_softened(student_logits, teacher_logits, labels, alpha, temperature):
    """You soften the student for the text too; against the one-hot label it stands at temperature 1."""
    hard, soft = two_terms(student_logits, teacher_logits, labels, temperature, temperature)
    return alpha * hard + (1 - alpha) * temperature**2 * soft


def loss_other_way_round(student_logits, teacher_logits, labels, alpha, temperature):
    """Your KL asks the student which tokens matter; the teacher should be asked."""
    hard, _ = two_terms(student_logits, teacher_logits, labels)
    labelled, T = labels[:, 1:] != -100, temperature
    log_q, log_p = logs(student_logits[:, :-1][labelled], teacher_logits[:, :-1][labelled], T)
    soft = (log_q.exp() * (log_q - log_p)).sum() / labelled.sum().clamp(min=1)
    return alpha * hard + (1 - alpha) * T**2 * soft


def teacher_everywhere(student_logits, teacher_logits, labels, alpha, temperature):
    """Your teacher speaks at every position, prompt and padding included; it is asked only where the
    student is trained."""
    hard, soft = two_terms(student_logits, teacher_logits, labels, temperature, everywhere=True)
    return alpha * hard + (1 - alpha) * temperature**2 * soft


def mask_not_shifted(student_logits, teacher_logits, labels, alpha, temperature):
    """Your text is shifted and your teacher is not: it is asked one token too late."""
    hard, _ = two_terms(student_logits, teacher_logits, labels)
    labelled = labels != -100
    log_q, log_p = logs(student_logits[labelled], teacher_logits[labelled], temperature)
    soft = (log_p.exp() * (log_p - log_q)).sum() / labelled.sum().clamp(min=1)
    return alpha * hard + (1 - alpha) * temperature**2 * soft


def nothing_shifted(student_logits, teacher_logits, labels, alpha, temperature):
    """Nothing is shifted in yours: every position is asked for the token that stands there already."""
    pad = F.pad(labels, (1, 0), value=-100)
    more = (F.pad(x, (0, 0, 0, 1)) for x in (student_logits, teacher_logits))
    return distillation_loss(*more, pad, alpha, temperature)


def nothing_left_is_nan(student_logits, teacher_logits, labels, alpha, temperature):
    """A batch without labels makes your mean 0/0."""
    labelled = labels[:, 1:] != -100
    loss = distillation_loss(student_logits, teacher_logits, labels, alpha, temperature)
    return loss * (labelled.sum() / labelled.sum())


def the_teacher_learns_too(student_logits, teacher_logits, labels, alpha, temperature):
    """The loss is right, but its gradient also runs into the teacher: cut it off there."""
    labelled, T = labels[:, 1:] != -100, temperature
    log_q = (student_logits[:, :-1][labelled] / T).log_softmax(-1)
    log_p = (teacher_logits[:, :-1][labelled] / T).log_softmax(-1)
    soft = (log_p.exp() * (log_p - log_q)).sum() / labelled.sum().clamp(min=1)
    hard, _ = two_terms(student_logits, teacher_logits, labels)
    return alpha * hard + (1 - alpha) * T**2 * soft


DISTILLATION_LOSS = Exercise(
    solution=distillation_loss,
    cases=distillation_loss_cases,
    run=run_with_gradients,
    title="The distillation loss",
    difficulty=3,
    importance=5,
    minutes=25,
    statement=r"""
$$\mathcal{L} = \alpha \cdot \mathrm{CE}(\text{label}, q_1) + (1 - \alpha)\; T^2\;
\mathrm{KL}(p_T \,\|\, q_T)$$

Both terms are means over the **same** tokens: those whose label is not -100, after the shift that you
know from the next-token loss. The check compares gradients as well: a loss can have the right value and
teach the wrong model.
""",
    hints=[
        "Pick the labelled positions once, as (N, V), from both models; the rest is simple.",
        "Logits at position t belong to the label at t + 1: which slice of each?",
        "A sum over nothing is 0 and still has a gradient; a mean over nothing is NaN.",
    ],
    mistakes=[t_squared_forgotten, t_once, t_squared_on_both, alpha_swapped, alpha_once, text_softened,
              loss_other_way_round, teacher_everywhere, mask_not_shifted, nothing_shifted,
              nothing_left_is_nan, the_teacher_learns_too],
    discussion="`minimind.stages.distill.distillation_loss` is this function; it also returns its two "
    "parts, so that you can log them.",
)  # fmt: skip


# 4. The gradient by hand


def soft_gradient(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the gradient of T²·KL(teacher ‖ student), mean over N positions, by the student's logits.

    Without autograd.

    Args:
        student_logits, teacher_logits: (N, V).

    Returns:
        (N, V).
    """
    ### BEGIN SOLUTION
    q = (student_logits / temperature).softmax(-1)
    p = (teacher_logits / temperature).softmax(-1)
    return temperature * (q - p) / len(student_logits)
    ### END SOLUTION


def soft_gradient_cases(seed: int) -> list[tuple]:
    return soft_kl_cases(seed)[::2]


def gradient_of_kl(student_logits, teacher_logits, temperature):
    """That is the gradient of the KL itself: T² is not in it."""
    return soft_gradient(student_logits, teacher_logits, temperature) / temperature**2


def without_chain_rule(student_logits, teacher_logits, temperature):
    """You forget that the logits are divided by T before anything else: the chain rule takes one of
    the two T away."""
    return soft_gradient(student_logits, teacher_logits, temperature) * temperature


def no_temperature_in_front(student_logits, teacher_logits, temperature):
    """The difference of the probabilities is right; T² and the chain rule leave a factor before it."""
    return soft_gradient(student_logits, teacher_logits, temperature) / temperature


def uphill(student_logits, teacher_logits, temperature):
    """Your sign is turned: where the student says too much, the gradient is positive, and a step goes
    against it."""
    return -soft_gradient(student_logits, teacher_logits, temperature)


def cold(student_logits, teacher_logits, temperature):
    """Your probabilities are those at temperature 1."""
    return (
        temperature
        * (student_logits.softmax(-1) - teacher_logits.softmax(-1))
        / len(student_logits)
    )


def difference_of_logits(student_logits, teacher_logits, temperature):
    """That is the limit of great heat, where logits are matched directly; your T is not infinite."""
    z, v = (x - x.mean(-1, keepdim=True) for x in (student_logits, teacher_logits))
    return (z - v) / z.numel()


def not_averaged(student_logits, teacher_logits, temperature):
    """You forget that the loss is a mean over positions."""
    return soft_gradient(student_logits, teacher_logits, temperature) * len(student_logits)


SOFT_GRADIENT = Exercise(
    solution=soft_gradient,
    cases=soft_gradient_cases,
    title="The gradient, and why T²",
    difficulty=3,
    importance=3,
    minutes=20,
    statement=r"""
Take $\frac{\partial}{\partial z_i}\, T^2\, \mathrm{KL}(p_T \,\|\, q_T)$ on paper, where
$q_T = \mathrm{softmax}(z / T)$. Only $-\sum_j p_j \log q_j$ depends on $z$. Then write what is left.

Afterwards put in a large $T$: replace $e^{x/T}$ by $1 + x/T$. What does the gradient become, and does
it still depend on $T$? That is the whole reason for the factor.
""",
    hints=[
        "∂ log q_j / ∂ (z_i / T) = [i = j] - q_i, as for any softmax.",
        "Σ p_j = 1 makes the sum collapse to a difference of two probabilities.",
        "The inner derivative of z/T is 1/T. What remains of T²?",
    ],
    mistakes=[gradient_of_kl, without_chain_rule, no_temperature_in_front, uphill, cold,
              difference_of_logits, not_averaged],
    discussion="For large T, q - p → (z - v) / (V·T) for centred logits, so T·(q - p) → (z - v) / V: heat "
    "turns distillation into matching logits, at a strength that no longer depends on T.",
)  # fmt: skip


# 5. Open-ended: a teacher on disk


def pack_teacher(teacher_logits: Tensor, k: int) -> dict[str, Tensor]:
    """Keep of each position's distribution k tokens, and how likely all the others are together.

    Args:
        teacher_logits: (N, V).
        k: tokens to keep, 1 ≤ k < V.

    Returns:
        {"tokens": (N, k) ids, "logps": (N, k) their natural log-probabilities, "rest": (N,) the
        probability of all other tokens together}. A reader spreads the rest evenly over the others.
    """
    ### BEGIN SOLUTION
    logps, tokens = teacher_logits.log_softmax(-1).topk(k, dim=-1)
    return {"tokens": tokens, "logps": logps, "rest": (1 - logps.exp().sum(-1)).clamp(min=0)}
    ### END SOLUTION


def pack_teacher_cases(seed: int) -> list[tuple]:
    g = numbers(seed)
    return [
        (3 * torch.randn(N, V, generator=g), k) for N, V, k in [(6, 40, 4), (5, 64, 8), (3, 9, 1)]
    ]


def unpack(packed: dict[str, Tensor], V: int) -> Tensor:
    """Return the (N, V) distribution that a reader makes of what was kept."""
    k = packed["tokens"].shape[-1]
    flat = (packed["rest"] / (V - k))[:, None].expand(-1, V)
    return flat.scatter(-1, packed["tokens"], packed["logps"].exp())


def lost_nats(p: Tensor, q: Tensor) -> float:
    """Return KL(p ‖ q), mean over positions."""
    return float((p * (p.log() - q.clamp(min=1e-30).log())).sum(-1).mean())


def judge_pack_teacher(cases: list[tuple], results: list[dict]) -> str | None:
    for (logits, k), packed in zip(cases, results):
        (N, V), p = logits.shape, logits.softmax(-1)
        if packed["tokens"].shape != (N, k) or packed["logps"].shape != (N, k):
            return f"For k = {k}, keep {k} tokens of each of the {N} positions: shape {(N, k)}."
        if packed["rest"].shape != (N,):
            return f"`rest` is one number for each position: shape {(N,)}."
        if any(len(set(row)) < k for row in packed["tokens"].tolist()):
            return "A token stands twice in one row."
        if packed["logps"].max() > 1e-4:
            return "A log-probability above 0 is a probability above 1."
        true = p.log().gather(-1, packed["tokens"])
        if not torch.allclose(true, packed["logps"], atol=0.05):
            return "What you keep is not the teacher's log-probability of that token."
        whole = packed["logps"].exp().sum(-1) + packed["rest"]
        if (whole - 1).abs().max() > 0.01:
            return f"Kept and rest together should be 1; yours are {show_row(whole)}."
        best = lost_nats(p, unpack(pack_teacher(logits, k), V))
        lost = lost_nats(p, unpack(packed, V))
        if lost > 1.05 * best + 1e-4:
            return f"For k = {k} your file loses {lost:.3f} nats a token; {best:.3f} is possible."
    return None


def show_row(values: Tensor) -> str:
    return ", ".join(f"{v:.2f}" for v in values[:4].tolist()) + (" …" if len(values) > 4 else "")


def kept(logits, k, **changed):
    return {**pack_teacher(logits, k), **changed}


def rest_forgotten(teacher_logits, k):
    """You call all other tokens impossible: a student would learn a certainty that its teacher never
    had."""
    return kept(teacher_logits, k, rest=torch.zeros(len(teacher_logits)))


def made_to_sum_to_one(teacher_logits, k):
    """You blow the kept probabilities up until they sum to 1, so your teacher sounds surer than it is."""
    logps = teacher_logits.topk(k, dim=-1).values.log_softmax(-1)
    return kept(teacher_logits, k, logps=logps, rest=torch.zeros(len(teacher_logits)))


def raw_logits_kept(teacher_logits, k):
    """You keep logits: without all the others nobody can turn them into probabilities again."""
    return kept(teacher_logits, k, logps=teacher_logits.topk(k, dim=-1).values)


def plain_probabilities_kept(teacher_logits, k):
    """You keep probabilities where log-probabilities were asked for."""
    return kept(teacher_logits, k, logps=teacher_logits.softmax(-1).topk(k, dim=-1).values)


def first_tokens_kept(teacher_logits, k):
    """You keep the same tokens everywhere; what matters differs from position to position."""
    tokens = torch.arange(k).expand(len(teacher_logits), k)
    logps = teacher_logits.log_softmax(-1)[:, :k]
    return {"tokens": tokens, "logps": logps, "rest": 1 - logps.exp().sum(-1)}


def least_likely_kept(teacher_logits, k):
    """You keep the tokens that the teacher finds least likely."""
    logps, tokens = teacher_logits.log_softmax(-1).topk(k, dim=-1, largest=False)
    return {"tokens": tokens, "logps": logps, "rest": 1 - logps.exp().sum(-1)}


def rest_per_token(teacher_logits, k):
    """Your rest is the share of one token; the reader divides it among the others once more."""
    rest = pack_teacher(teacher_logits, k)["rest"] / (teacher_logits.shape[-1] - k)
    return kept(teacher_logits, k, rest=rest)


PACK_TEACHER = Exercise(
    solution=pack_teacher,
    cases=pack_teacher_cases,
    judge=judge_pack_teacher,
    title="A teacher on disk (open-ended)",
    difficulty=3,
    importance=3,
    minutes=30,
    statement="""
The teacher's forward pass costs more than the student's whole step, and it gives the same answer in
every epoch. So write its opinions down once. All of them are too many: a billion tokens with 6,400
half-precision numbers each are 13 terabytes. Keep `k` tokens of each position, and one number for the
rest.

The check unpacks what you return (the rest is spread evenly over the other tokens) and measures
KL(teacher ‖ unpacked). Your file must be honest (it sums to 1 and says what the teacher said) and lose
hardly more than the best choice of k tokens.

Then go on: how do the lost nats fall with k, on the course's teacher? How many bits does each number
need? How would you spread the rest better than evenly, for one more number? And what changes if the
student is trained at T = 4?
""",
    hints=[
        "Which tokens lose most if they are replaced by an average?",
        "`log_softmax` over ALL tokens first, then choose.",
        "What is not kept has a probability too: everything together sums to 1.",
    ],
    mistakes=[rest_forgotten, made_to_sum_to_one, raw_logits_kept, plain_probabilities_kept,
              first_tokens_kept, least_likely_kept, rest_per_token],
    discussion="Keeping the top k and making them sum to 1 is common and biased. Drawing tokens from the "
    "teacher instead gives an unbiased gradient with as few numbers (arXiv 2503.16870).",
)  # fmt: skip

EXERCISES = [SOFTEN, SOFT_KL, DISTILLATION_LOSS, SOFT_GRADIENT, PACK_TEACHER]
