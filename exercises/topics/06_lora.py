"""Exercises 06: the adapted projection, its gradients, what is trained, merging, the best rank r."""

from __future__ import annotations

import torch
from checks import Exercise
from torch import Tensor

TITLE = "LoRA"
PRACTISES = (
    "adding a low-rank update to a projection, seeing why one factor starts at zero, counting what is "
    "trained, merging, and finding the best update of a given rank."
)


def numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrices(seed: int, *sizes: tuple[int, ...]) -> list[Tensor]:
    g = numbers(seed)
    return [torch.randn(*size, generator=g) for size in sizes]


# 1. The adapted projection


def lora_forward(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """Return x·Wᵀ + (alpha/r)·x·Aᵀ·Bᵀ, (batch, time, out).

    Args:
        x: (batch, time, in).
        weight: (out, in), as `nn.Linear` keeps it.
        A: (r, in). B: (out, r).
    """
    ### BEGIN SOLUTION
    r = A.shape[0]
    return x @ weight.T + alpha / r * (x @ A.T) @ B.T
    ### END SOLUTION


def lora_forward_cases(seed: int) -> list[tuple]:
    cases = []
    for n, (batch, time, inner, out, r) in enumerate(
        [(1, 2, 4, 4, 4), (2, 3, 6, 5, 2), (3, 2, 4, 7, 3)]
    ):
        shapes = (batch, time, inner), (out, inner), (r, inner), (out, r)
        cases.append((*matrices(10 * seed + n, *shapes), float([5, 8, 2][n])))
    return cases  # fmt: skip


def not_scaled(x, weight, A, B, alpha):
    """Your update has no scale: alpha plays no part."""
    return lora_forward(x, weight, A, B, float(A.shape[0]))


def alpha_not_divided(x, weight, A, B, alpha):
    """You scale by alpha alone, so an adapter of twice the rank is twice as strong."""
    return lora_forward(x, weight, A, B, alpha * A.shape[0])


def divided_by_inputs(x, weight, A, B, alpha):
    """You divide alpha by the number of inputs; r is the size that the two factors share."""
    return lora_forward(x, weight, A, B, alpha * A.shape[0] / A.shape[1])


def scaled_all(x, weight, A, B, alpha):
    """You scale the frozen projection too; with B at zero the model must be what it was."""
    return alpha / A.shape[0] * (x @ weight.T + (x @ A.T) @ B.T)


def update_alone(x, weight, A, B, alpha):
    """The frozen weight takes no part in your result; the adapter stands beside it, not in its
    place."""
    return lora_forward(x, torch.zeros_like(weight), A, B, alpha)


def scaled_twice(x, weight, A, B, alpha):
    """You apply the scale at both factors, so it enters squared."""
    return lora_forward(x, weight, A, B, alpha * alpha / A.shape[0])


LORA_FORWARD = Exercise(
    solution=lora_forward,
    cases=lora_forward_cases,
    title="A projection with an adapter",
    difficulty=1,
    importance=5,
    minutes=10,
    statement="""
A frozen weight, and beside it two thin matrices whose product has the weight's shape but only rank r.
Write the forward pass. **Before you write:** in which order do you multiply, so that no matrix of the
size (out, in) is ever built?
""",
    hints=[
        "`nn.Linear` keeps its weight as (out, in) and computes x·Wᵀ. A and B follow the same habit.",
        "First down to r numbers per token, with A; then up to `out`, with B. Where do you read r from?",
    ],
    mistakes=[not_scaled, alpha_not_divided, divided_by_inputs, scaled_all, update_alone, scaled_twice],
    discussion="(x·Aᵀ)·Bᵀ costs r·(in + out) products per token; x·(B·A)ᵀ would cost in·out, as the frozen "
    "projection does, and would first build B·A.",
)  # fmt: skip


# 2. What is trained


def lora_share(shapes: dict[str, tuple[int, int]], targets: list[str], r: int, total: int) -> float:
    """Return the numbers in all adapters over the numbers in the model without them.

    Args:
        shapes: the (out, in) of every projection by its full name, such as
            "layers.0.mlp.up_proj".
        targets: last parts of names, such as ["up_proj"]; each projection so called is adapted.
        total: numbers in the whole model, embeddings and norms included.
    """
    ### BEGIN SOLUTION
    adapted = [shape for name, shape in shapes.items() if name.split(".")[-1] in targets]
    return sum(r * (out + inner) for out, inner in adapted) / total
    ### END SOLUTION


def lora_share_cases(seed: int) -> list[tuple]:
    sizes = {"q_proj": (16, 12), "k_proj": (6, 12), "up_proj": (30, 12), "down_proj": (12, 30)}
    shapes = {f"layers.{i}.{name}": size for i in range(2 + seed) for name, size in sizes.items()}
    return [
        ({"layers.0.q_proj": (4, 4)}, ["q_proj"], 1, 16),
        (shapes, ["q_proj", "down_proj"], 3, 9000),
        (shapes, ["k_proj", "up_proj"], 2, 7777),
        (shapes, list(sizes), 5, 8001),
    ]


def full_matrices(shapes, targets, r, total):
    """You count the frozen weights of the adapted projections; trained are only the thin ones."""
    adapted = [shape for name, shape in shapes.items() if name.split(".")[-1] in targets]
    return sum(out * inner for out, inner in adapted) / total


def as_if_square(shapes, targets, r, total):
    """You count as if every projection were square; many are wider on one side."""
    adapted = [shape for name, shape in shapes.items() if name.split(".")[-1] in targets]
    return sum(2 * r * out for out, _ in adapted) / total


def one_factor(shapes, targets, r, total):
    """You count only one of the two factors."""
    adapted = [shape for name, shape in shapes.items() if name.split(".")[-1] in targets]
    return sum(r * inner for _, inner in adapted) / total


def against_projections(shapes, targets, r, total):
    """You divide by the projections alone; the model has embeddings and norms too."""
    everything = sum(out * inner for out, inner in shapes.values())
    return lora_share(shapes, targets, r, everything)


def adapters_in_total(shapes, targets, r, total):
    """Your whole includes the adapters themselves; asked for is the model without them."""
    share = lora_share(shapes, targets, r, total)
    return share / (1 + share)


def one_layer(shapes, targets, r, total):
    """You count each name once; every layer has projections of that name."""
    last = {name.split(".")[-1]: shape for name, shape in shapes.items()}
    return lora_share(last, targets, r, total)


def targets_ignored(shapes, targets, r, total):
    """You adapt every projection, whatever the targets say."""
    return lora_share(shapes, [name.split(".")[-1] for name in shapes], r, total)


LORA_SHARE = Exercise(
    solution=lora_share,
    cases=lora_share_cases,
    title="How much is trained?",
    difficulty=2,
    importance=3,
    minutes=10,
    statement="""
"Trains less than three per cent of the weights": of which, and counted how? Count all adapters of a
model. For one 4×4 projection with r = 1 the answer is 8/16 = 0.5, so at small sizes low rank saves little:
the saving grows with the width.
""",
    hints=[
        "How many numbers has A, how many B, for one projection of shape (out, in)?",
        "The last part of a full name is what stands after its last dot. Sum over all layers.",
    ],
    mistakes=[full_matrices, as_if_square, one_factor, against_projections, adapters_in_total,
              one_layer, targets_ignored],
    discussion="Memory is saved mostly elsewhere: AdamW keeps two numbers for every *trained* number, and "
    "frozen weights need neither those nor a gradient.",
)  # fmt: skip


# 3. Gradients


def lora_gradients(
    x: Tensor, grad_y: Tensor, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the loss with respect to A, (r, in), and B, (out, r), by hand.

    The projection is y = x·Wᵀ + scale·x·Aᵀ·Bᵀ.

    Args:
        x: (N, in), what came in for N tokens.
        grad_y: (N, out), the gradient of the loss with respect to y.
    """
    ### BEGIN SOLUTION
    grad_A = scale * (grad_y @ B).T @ x
    grad_B = scale * grad_y.T @ (x @ A.T)
    return grad_A, grad_B
    ### END SOLUTION


def lora_gradients_cases(seed: int) -> list[tuple]:
    cases = []
    for n, (tokens, inner, out, r) in enumerate([(1, 3, 3, 3), (5, 4, 6, 2), (7, 6, 4, 3)]):
        x, grad_y, A, B = matrices(
            10 * seed + n, (tokens, inner), (tokens, out), (r, inner), (out, r)
        )
        cases.append((x, grad_y, A, B, [0.5, 2.0, 3.0][n]))
    x, grad_y, A, B, scale = cases[1]
    return [*cases, (x, grad_y, A, torch.zeros_like(B), scale)]  # the first step of training


def gradient_not_scaled(x, grad_y, A, B, scale):
    """The scale is part of the forward pass, so the chain rule meets it on the way back as well."""
    return lora_gradients(x, grad_y, A, B, 1.0)


def gradient_mean(x, grad_y, A, B, scale):
    """You average over the tokens; the loss has done that, and its gradient holds it already."""
    return tuple(g / len(x) for g in lora_gradients(x, grad_y, A, B, scale))


def gradients_swapped(x, grad_y, A, B, scale):
    """You return the gradient of B first."""
    return lora_gradients(x, grad_y, A, B, scale)[::-1]


def own_factor(x, grad_y, A, B, scale):
    """Each of your gradients contains its own factor. In a product a·b the gradient of a is b."""
    return scale * A * (grad_y @ B).T.sum(1, keepdim=True), scale * B * grad_y.T.sum(
        1, keepdim=True
    )


def both_move(x, grad_y, A, B, scale):
    """With B at zero your A gets a gradient. What A does reaches the loss only through B."""
    grad_A, grad_B = lora_gradients(x, grad_y, A, B, scale)
    return scale * (grad_y @ torch.ones_like(B)).T @ x if not B.any() else grad_A, grad_B


def only_a_moves(x, grad_y, A, B, scale):
    """Your B never moves, and since it starts at zero nothing ever would."""
    return lora_gradients(x, grad_y, A, B, scale)[0], torch.zeros_like(B)


LORA_GRADIENTS = Exercise(
    solution=lora_gradients,
    cases=lora_gradients_cases,
    title="Which factor moves first?",
    difficulty=3,
    importance=4,
    minutes=20,
    statement="""
B starts at zero, A at random. **Predict** which of the two has a gradient at the first step, then derive
both. Start from y = x·Wᵀ + s·x·Aᵀ·Bᵀ and the rule for a product of matrices: if $Y = XM^\\top$, then
$\\partial L/\\partial M = (\\partial L/\\partial Y)^\\top X$. Use it once with $X$ = what B receives, and once
with what comes back to A through B.
""",
    hints=[
        "B sees h = x·Aᵀ, (N, r), and gives s·h·Bᵀ. That is the rule, with X = h and a scale.",
        "What comes back to h is s·grad_y·B, (N, r). A sees x: the same rule again.",
    ],
    mistakes=[gradient_not_scaled, gradient_mean, gradients_swapped, own_factor, both_move, only_a_moves],
    discussion="With B = 0 the gradient of A is exactly zero at the first step, and B's is not: so B moves first, "
    "then A can. With both at zero, both gradients are zero for ever.",
)  # fmt: skip


# 4. Merging


def merge_adapter(
    state: dict[str, Tensor], adapter: dict[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """Return a new state dict with the adapter added to the weights, its keys those of `state`.

    Args:
        state: weights by name, such as "up_proj.weight" (out, in). Leave it as it is.
        adapter: for some of them "up_proj.lora_A.weight" (r, in) and "up_proj.lora_B.weight" (out, r).
        scale: alpha/r.
    """
    ### BEGIN SOLUTION
    merged = dict(state)
    for name, A in adapter.items():
        if name.endswith(".lora_A.weight"):
            projection = name.removesuffix(".lora_A.weight")
            B = adapter[f"{projection}.lora_B.weight"]
            merged[f"{projection}.weight"] = state[f"{projection}.weight"] + scale * B @ A
    return merged
    ### END SOLUTION


def merge_adapter_cases(seed: int) -> list[tuple]:
    names = ("q_proj", "up_proj", "norm", "down_proj")
    sizes = {"q_proj": (5, 5), "up_proj": (7, 5), "down_proj": (5, 7), "norm": (5,)}
    cases = []
    for n, (adapted, r) in enumerate(
        [(["q_proj"], 2), (["q_proj"], 5), (["up_proj", "down_proj"], 3)]
    ):
        weights = matrices(10 * seed + n, *(sizes[name] for name in names))
        state = {f"{name}.weight": w for name, w in zip(names, weights)}
        adapter = {}
        for name in adapted:
            out, inner = sizes[name]
            A, B = matrices(100 * seed + n, (r, inner), (out, r))
            adapter |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        cases.append((state, adapter, [2.0, 0.5, 3.0][n]))
    return cases  # fmt: skip


def merged_with(state, adapter, update):
    """Add update(A, B) to every adapted weight."""
    merged = dict(state)
    for name in adapter:
        if ".lora_A" in name:
            A, B = adapter[name], adapter[name.replace("lora_A", "lora_B")]
            key = name.replace(".lora_A", "")
            merged[key] = merged[key] + update(A, B)
    return merged


def merged_not_scaled(state, adapter, scale):
    """The merged model is not the one you trained: its updates were scaled, yours are added bare."""
    return merged_with(state, adapter, lambda A, B: B @ A)


def merged_transposed(state, adapter, scale):
    """Your update lies on its side. Check its shape against a weight that is not square."""
    return merged_with(state, adapter, lambda A, B: scale * (B @ A).T)


def merged_over(state, adapter, scale):
    """You replace the weight by its update; what the model knew is gone."""
    merged = merged_with(state, adapter, lambda A, B: scale * B @ A)
    return {name: m if m is state[name] else m - state[name] for name, m in merged.items()}


def merged_away(state, adapter, scale):
    """You take the update off, as one does to undo a merge."""
    return merged_with(state, adapter, lambda A, B: -scale * B @ A)


def merged_and_kept(state, adapter, scale):
    """Your merged model still carries the adapter; loaded as a plain model it has unknown keys."""
    return {**merge_adapter(state, adapter, scale), **adapter}


def only_the_changed(state, adapter, scale):
    """You return the adapted weights alone; the others belong to the model as well."""
    merged = merge_adapter(state, adapter, scale)
    return {name: m for name, m in merged.items() if m is not state[name]}


MERGE_ADAPTER = Exercise(
    solution=merge_adapter,
    cases=merge_adapter_cases,
    title="Merge",
    difficulty=2,
    importance=4,
    minutes=15,
    statement="""
A trained adapter costs a little time in every forward pass. Add it to the weights once, and the model is
plain again: the same shapes, the same speed, the same names, and (up to rounding) the same logits.
Work on a copy of the dict: the base is still needed for the next adapter.
""",
    hints=[
        "Which of B·A and A·B has the shape of the weight?",
        "Go through the adapter's A matrices; their names tell those of B and of the weight.",
    ],
    mistakes=[merged_not_scaled, merged_transposed, merged_over, merged_away, merged_and_kept,
              only_the_changed],
    discussion="`minimind.lora.merge_lora` is this function for a model. To undo a merge one can subtract, but "
    "float32 does not give back the very bits; keep the base.",
)  # fmt: skip


# 5. Open-ended: the best adapter of a given rank


def best_adapter(update: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) whose product B·A is as near to `update` (out, in) as can be.

    Near: the sum of the squared differences. Any A and B with the best product will do.
    """
    ### BEGIN SOLUTION
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    return S[:r, None] * Vh[:r], U[:, :r]
    ### END SOLUTION


def best_adapter_cases(seed: int) -> list[tuple]:
    cases = []
    for n, (out, inner, r) in enumerate([(6, 9, 2), (12, 7, 3), (8, 8, 1)]):
        left, right, noise = matrices(10 * seed + n, (out, 4), (4, inner), (out, inner))
        strengths = torch.tensor([4.0, 2.0, 1.0, 0.5])
        cases.append((left * strengths @ right + 0.3 * noise, r))
    return cases


def miss(update: Tensor, product: Tensor) -> float:
    return float((update - product).square().sum())


def judge_best_adapter(cases: list[tuple], results: list) -> str | None:
    for (update, r), (A, B) in zip(cases, results):
        wanted = (r, update.shape[1]), (update.shape[0], r)
        if (tuple(A.shape), tuple(B.shape)) != wanted:
            return (
                f"For an update {tuple(update.shape)} and r = {r}, A must be {wanted[0]} and B "
                f"{wanted[1]}; yours are {tuple(A.shape)} and {tuple(B.shape)}."
            )
        mine = miss(update, B @ A)
        A_best, B_best = best_adapter(update, r)
        best = miss(update, B_best @ A_best)
        if not mine <= 1.01 * best:
            return (
                f"For an update {tuple(update.shape)} and r = {r} your squared error is {mine:.4g}; "
                f"{best:.4g} can be reached, and B = 0 gives {miss(update, 0 * update):.4g}."
            )
    return None


def corner(update, r):
    """You keep some rows of the update and drop the rest; the best directions need not lie along
    the axes."""
    return update[:r].clone(), torch.eye(len(update))[:, :r].contiguous()


def smallest_kept(update, r):
    """You keep the weakest directions; singular values come sorted from large to small."""
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    return S[-r:, None] * Vh[-r:], U[:, -r:]


def strengths_lost(update, r):
    """You have the right directions without their strengths."""
    U, _, Vh = torch.linalg.svd(update, full_matrices=False)
    return Vh[:r], U[:, :r]


def strengths_twice(update, r):
    """Your strengths are in both factors, so in the product they are squared."""
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    return S[:r, None] * Vh[:r], U[:, :r] * S[:r]


def random_a_fitted_b(update, r):
    """You fit only B, to an A that is drawn at random; A can be chosen too."""
    A = torch.randn(r, update.shape[1], generator=numbers(0))
    return A, update @ torch.linalg.pinv(A)


def column_space_of_v(update, r):
    """`torch.linalg.svd` returns V already transposed: its rows are the directions, not its
    columns."""
    U, S, Vh = torch.linalg.svd(update, full_matrices=True)
    return S[:r, None] * Vh[:, :r].T, U[:, :r]


BEST_ADAPTER = Exercise(
    solution=best_adapter,
    cases=best_adapter_cases,
    judge=judge_best_adapter,
    title="The best adapter (open-ended)",
    difficulty=4,
    importance=3,
    minutes=30,
    statement="""
Somebody fine-tuned *all* weights. How much of their update would an adapter of rank r have caught, at
best? The theorem of Eckart and Young answers: cut the singular value decomposition after its r largest values.
Return that as A and B, the way LoRA keeps them. (Several splits of the product are right; choose yours.)

Then use it: load `pretrain` and `full_sft`, take the differences of all projections, and plot the
share of the update that is missed against r. Which projections need the most rank? Build a model from the best
rank-8 updates of every projection: does it still answer? And does *trained* LoRA at the same rank come out better?
""",
    hints=[
        "`torch.linalg.svd(update, full_matrices=False)` gives U (out, k), S (k,), Vh (k, in), largest first.",
        "The best product is the sum of the r first terms S[i]·U[:, i]·Vh[i]. Put S into one factor, or its "
        "square root into both.",
    ],
    mistakes=[corner, smallest_kept, strengths_lost, strengths_twice, random_a_fitted_b,
              column_space_of_v],
    discussion="The missed share is the sum of the squares of the singular values that were cut. Gradient descent "
    "on A and B does not aim at this update, though: it finds its own, for the loss and not for the weights.",
)  # fmt: skip

EXERCISES = [LORA_FORWARD, LORA_SHARE, LORA_GRADIENTS, MERGE_ADAPTER, BEST_ADAPTER]
