"""What the reinforcement learning stages share: problems in, rewarded answers and batches out.

A row is a conversation whose last assistant turn is empty: the model is to write it. Its
`"answer"`, if it has one, is what can be verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from minimind import distributed
from minimind.checkpoint import load
from minimind.config import GRPOConfig, SPOConfig
from minimind.corpus import Rows, hash_of, read_rows
from minimind.data import IGNORED, Batch, Example, check_conversation, pad_batch
from minimind.errors import UserError
from minimind.generate import sample_rollouts
from minimind.precision import autocast
from minimind.rewards import LearnedReward, Rewards, exact, folder_scorer
from minimind.stages.common import batch_logps
from minimind.stages.reward import score_conversations
from minimind.tokenizer import Tokenizer

ROWS = 32  # answers in one forward pass of an update; sorted by length they need little padding
SAMPLES_EVERY = 5  # rows of the log between two printed answers
SEEDS_PER_STEP = 1_000_003  # so that no step shares a stream with one of a neighbouring seed
RLConfig = GRPOConfig | SPOConfig


def make_reward(config: RLConfig, problems: Sequence[dict], device: torch.device) -> Rewards:
    """Return what the stage pays for.

    If every problem can be verified: the right answer, and nothing that can be had without it; a
    `reward_model_path` is then named in a warning. Problems without an "answer" are judged by a
    reward model, the one of `reward_model_path` or our own; with `reasoning` the form with tags is
    paid for as well, as the guide does.

    Raises:
        UserError: a reward model is needed and is missing or cannot be used.
    """
    path = config.reward_model_path
    if all("answer" in row for row in problems):
        if path:
            distributed.say(f'Warning: every problem has an "answer", so {path} judges nothing.')
        return Rewards([("exact", 1.0)])
    if path and not path.endswith(".pth"):
        score = folder_scorer(path, bool(config.allow_remote_code), device)
    else:
        model, tokenizer = load(path or "reward", config.out_dir)
        score = partial(score_conversations, model.to(device), tokenizer)
    learned = LearnedReward(score, bool(config.reasoning))
    form = [("format", 1.0), ("tags", 1.0)] if config.reasoning else []
    return Rewards([("exact", 1.0), ("reward_model", 1.0, learned), *form])


def check_problem(row: dict) -> str | None:
    """Return what is wrong with a row for reinforcement learning, or None."""
    fault = check_conversation(row)
    if fault:
        return fault
    *asked, last = row["conversations"]
    if last["role"] != "assistant" or last["content"].strip() or not asked:
        return (
            "its last turn must be an empty assistant turn after a question, for the model to write; "
            f'it is {last}. Append {{"role": "assistant", "content": ""}}.'
        )
    if "answer" in row and not (isinstance(row["answer"], str) and row["answer"].strip()):
        return f'"answer" must be a string; it is {row["answer"]!r}. Give the right answer, or leave it out.'
    return None


def prompt_ids(row: dict, tokenizer: Tokenizer) -> list[int]:
    """Return the conversation up to the empty turn, which is opened for the model to write."""
    return tokenizer.encode_chat(row["conversations"][:-1], add_generation_prompt=True)


def read_problems(config: RLConfig, tokenizer: Tokenizer, room: int) -> Rows:
    """Open the rows of `data_path`; those with prompts beyond `max_seq_len` are left out and counted.

    Cutting a prompt would ask another question, so it is left whole or out.

    Args:
        room: positions of the model, which prompt and answer must share.

    Raises:
        UserError: a bad row, one whose prompt leaves no room to answer, or no row is left.
    """

    def check(row: dict) -> str | None:
        fault = check_problem(row)
        size = 0 if fault else len(prompt_ids(row, tokenizer))
        if size + config.max_new_tokens > room:
            return (
                f"its prompt has {size} tokens and leaves no room for max_new_tokens="
                f"{config.max_new_tokens} in the model's {room} positions. Shorten it or lower "
                "max_new_tokens."
            )
        return fault

    def look(row: dict) -> tuple[int, str | None]:
        if len(prompt_ids(row, tokenizer)) > config.max_seq_len:
            return 0, f"prompt longer than max_seq_len={config.max_seq_len}, left out"
        return 1, None  # not bucketed: a batch of one length is a batch of one difficulty

    made_for = f"problems {hash_of(tokenizer)} {config.max_seq_len} {room - config.max_new_tokens}"
    skip = bool(config.skip_bad_rows)
    problems = read_rows(config.data_path, check, lambda row: row, look, made_for, skip)
    if not len(problems):
        raise UserError(
            f"Every prompt of {config.data_path} is longer than max_seq_len={config.max_seq_len} "
            "tokens. Raise max_seq_len."
        )
    return problems


def problem_numbers(examples: Sequence[Example]) -> Batch:
    """Collate examples `{"row": [i]}` to the numbers of the problems, (B,)."""
    return {"row": torch.tensor([example["row"][0] for example in examples])}


@dataclass
class Answers:
    """The sampled and rewarded answers of one step; those to one problem stand together.

    Attributes:
        problems: the row that each answer belongs to, N of them.
        prompts, completions: token ids.
        logps: (N, T) log-probability of every sampled token when it was sampled, 0 after the end.
        texts: the completions as text.
        truncated: (N,) bool, cut at `max_new_tokens` before they ended.
        rewards: (N,).
        unit_rewards: (N,), what each is from the lowest (0) to the highest (1) that its problem gives.
        parts: name of every part of the reward to its values (N,), unweighted.
        right: (N,) 1.0 or 0.0; NaN where the problem has no "answer" to verify.
    """

    problems: list[dict]
    prompts: list[list[int]]
    completions: list[list[int]]
    logps: Tensor
    texts: list[str]
    truncated: Tensor
    rewards: Tensor
    unit_rewards: Tensor
    parts: dict[str, Tensor]
    right: Tensor

    def figures(self) -> dict[str, float]:
        """Return what is logged of a step. Entropy is estimated by -ln p of the sampled tokens."""
        tokens = sum(len(completion) for completion in self.completions)
        found = {
            "reward": float(self.rewards.mean()),
            "accuracy": float(self.right.nanmean()),
            "entropy": float(-self.logps.sum()) / tokens,
            "length": tokens / len(self.completions),
            "truncated": float(self.truncated.float().mean()),
        }
        if len(self.parts) > 1:
            found |= {f"reward_{name}": float(part.mean()) for name, part in self.parts.items()}
        return {name: value for name, value in found.items() if value == value}


def sample_answers(
    model: nn.Module, problems: Sequence[dict], num_generations: int, config: RLConfig,
    tokenizer: Tokenizer, reward: Rewards, step: int,
) -> Answers:  # fmt: skip
    """Sample `num_generations` answers to every problem at temperature 1, and reward them.

    An answer that was cut earns the lowest reward that its problem can give, whatever it holds: the
    model is to learn to end, and no cut answer is better than one that ended.

    No temperature, no top-p, and the precision of training: they come from exactly the distribution
    whose log-probabilities are trained. The sample depends on the weights, the seed and the step
    alone: several processes share the problems out, and each gets the answers that one alone would
    have sampled (in bfloat16 but for rounding, which depends on the size of a batch).

    Raises:
        UserError: the reward is NaN, or not one for each answer.
    """

    def sample(part: Sequence[dict], first: int) -> Answers:
        row = first * num_generations
        return sample_part(model, part, num_generations, config, tokenizer, reward, step, row)

    return joined(distributed.in_parts(sample, problems))


def joined(parts: Sequence[Answers]) -> Answers:
    """Return answers that were sampled in several parts as one."""
    if len(parts) == 1:
        return parts[0]
    columns = {field.name: [getattr(p, field.name) for p in parts] for field in fields(Answers)}
    width = max(logps.shape[1] for logps in columns["logps"])
    columns["logps"] = [F.pad(logps, (0, width - logps.shape[1])) for logps in columns["logps"]]
    return Answers(**{name: _joined_column(values) for name, values in columns.items()})


def _joined_column(values: Sequence) -> object:
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    if isinstance(values[0], dict):
        return {name: torch.cat([value[name] for value in values]) for name in values[0]}
    return [item for value in values for item in value]


def sample_part(
    model: nn.Module, problems: Sequence[dict], num_generations: int, config: RLConfig,
    tokenizer: Tokenizer, reward: Rewards, step: int, first_row: int,
) -> Answers:  # fmt: skip
    """`sample_answers` on one process; `first_row` is the number of the first answer in the whole."""
    prompts = [prompt_ids(row, tokenizer) for row in problems]
    with autocast(config, model.device):
        sampled = sample_rollouts(
            model, prompts, num_generations, config.max_new_tokens, tokenizer.eos_id,
            seed=config.seed + SEEDS_PER_STEP * step, first_row=first_row,
            compiled=bool(config.compile) and model.device.type == "cuda",
        )  # fmt: skip
    each = [i for i in range(len(problems)) for _ in range(num_generations)]
    rows = [problems[i] for i in each]
    texts = [tokenizer.decode(completion) for completion in sampled.completions]
    scores, parts = reward(rows, texts)
    lowest, highest = reward.spans(rows)
    truncated = sampled.truncated.cpu()
    rewards = torch.where(truncated, lowest, scores)
    return Answers(
        problems=rows,
        prompts=sampled.prompt_ids,
        completions=sampled.completions,
        logps=sampled.logps.cpu(),
        texts=texts,
        truncated=truncated,
        rewards=rewards,
        unit_rewards=((rewards - lowest) / (highest - lowest).clamp(min=1e-6)).clamp(0, 1),
        parts=parts,
        right=torch.tensor(
            [
                exact(text, row["answer"]) if "answer" in row else float("nan")
                for row, text in zip(rows, texts, strict=True)
            ]
        ),
    )


def shared_batches(
    answers: Answers, columns: dict[str, Tensor], pad_id: int, kept: Tensor | None = None
) -> list[Batch]:
    """Return this process's part of `training_batches`, which are cut so that all get some."""
    count = len(answers.texts) if kept is None else int(kept.sum())
    rows = min(ROWS, -(-count // distributed.size()))
    batches = training_batches(answers, columns, pad_id, kept, rows)
    return distributed.shared(batches, range(len(batches)))


def training_batches(
    answers: Answers, columns: dict[str, Tensor], pad_id: int, kept: Tensor | None = None,
    size: int = ROWS,
) -> list[Batch]:  # fmt: skip
    """Return prompts with their answers as batches of at most `size`, sorted by length.

    Args:
        columns: name to (N,) values of the answers, which become entries of the batches.
        kept: (N,) bool, the answers to train on; default all.

    Returns:
        batches of `input_ids` and `labels` (B, T), -100 on prompt and padding, and the columns.
    """
    examples = []
    for prompt, completion in zip(answers.prompts, answers.completions, strict=True):
        labels = [IGNORED] * len(prompt) + completion
        examples.append({"input_ids": prompt + completion, "labels": labels})
    order = [i for i in range(len(examples)) if kept is None or kept[i]]
    order.sort(key=lambda i: len(examples[i]["input_ids"]))
    batches = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = pad_batch([examples[i] for i in rows], pad_id)
        batches.append({**batch, **{name: values[rows] for name, values in columns.items()}})
    return batches


@torch.no_grad()
def add_logps(name: str, model: nn.Module, batches: Sequence[Batch], config: RLConfig) -> None:
    """Put log-probabilities (B, T-1) of the sampled tokens under `model` into every batch.

    In the precision of training, and batch by batch as there: else the ratio of two equal policies
    would not be 1.
    """
    device = next(model.parameters()).device
    for batch in batches:
        with autocast(config, device):
            batch[name] = batch_logps(
                model, {k: batch[k].to(device) for k in ("input_ids", "labels")}
            )


def print_sample(answers: Answers, step: int, every: int) -> None:
    """Print one answer of each `every`-th step, from another place in the batch each time."""
    if step % every or not distributed.is_first():
        return
    i = step % len(answers.texts)
    question = answers.problems[i]["conversations"][-2]["content"]
    wanted = answers.problems[i].get("answer")
    tqdm.write(
        f"step {step}: {question} → {answers.texts[i]}"
        + (" (cut)" if answers.truncated[i] else "")
        + f"   reward {float(answers.rewards[i]):.2f}"
        + (f", right is {wanted}" if wanted else "")
    )
