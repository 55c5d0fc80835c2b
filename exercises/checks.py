"""Checks that name your mistake: `check(name, function)`, `hint(name, level)`, `progress()`.

For every exercise a topic file (`topics/NN_topic.py`) holds a solution, inputs, and the mistakes
that people really make, as code. `check` runs your function and the solution on the same inputs. If
the two disagree, it looks for the kept mistake that gives exactly *your* numbers and answers with
that mistake's sentence; if none does, it shows what was expected beside what you returned.

Reads top to bottom: what an exercise is, how a function is run and compared, what a learner calls.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import random
import reprlib
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
PROGRESS_FILE = FOLDER / ".progress.json"
SEED = 1
NOT_WRITTEN = "Not written yet: put your code in place of `raise NotImplementedError`."
Case = tuple[Any, ...]


def call(function: Callable, *arguments: Any) -> Any:
    """Run a function on one case: the plain way."""
    return function(*arguments)


@dataclass
class Exercise:
    """One exercise. Its name is the name of `solution`, whose docstring the learner sees too.

    Attributes:
        solution: the answer; what stands between `### BEGIN SOLUTION` and `### END SOLUTION`
            is taken out of the stub.
        cases: seed to a list of argument tuples, chosen so that every mistake shows.
        difficulty, importance: 1 to 5.
        hints: from a nudge to almost the answer.
        mistakes: functions with the signature of `solution`. The docstring of each is the one
            sentence its maker is told: it points to the idea and does not give the line away.
        run: how a function is used on one case, if not by calling it: (function, *case) to what
            is compared. It can give a tokenizer, take gradients, feed tokens one by one.
        judge: for an open exercise, which has no single right answer: (cases, results) to a
            complaint or None. It may return `sentence(mistake)` for all that are like a mistake.
        discussion: what is worth knowing afterwards.
    """

    solution: Callable
    cases: Callable[[int], list[Case]]
    title: str
    difficulty: int
    importance: int
    minutes: int
    statement: str
    hints: list[str]
    mistakes: list[Callable]
    run: Callable = call
    judge: Callable[[list[Case], list[Any]], str | None] | None = None
    discussion: str = ""

    @property
    def name(self) -> str:
        """The name under which `check` and `hint` know it."""
        return self.solution.__name__


def sentence(mistake: Callable) -> str:
    """Return what somebody who made this mistake is told: its docstring, on one line."""
    return " ".join((mistake.__doc__ or "").split())


@cache
def topics() -> dict[str, ModuleType]:
    """Return every topic file by its stem, in order. Each defines TITLE, PRACTISES, EXERCISES."""
    found = {}
    for path in sorted((FOLDER / "topics").glob("[0-9]*.py")):
        spec = importlib.util.spec_from_file_location(f"topic_{path.stem}", path)
        found[path.stem] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[path.stem])
    return found


def find(name: str) -> Exercise:
    """Return the exercise of that name. KeyError, listing the names, if there is none."""
    known = {e.name: e for topic in topics().values() for e in topic.EXERCISES}
    if name not in known:
        raise KeyError(f"There is no exercise {name!r}. Known: {', '.join(known)}.")
    return known[name]


# How a function is run and compared


class InputChanged(Exception):
    """A function wrote into its arguments."""


def outcome(exercise: Exercise, function: Callable, case: Case) -> Any:
    """Return what the function gives on a copy of the case, or the exception that it raised.

    Random numbers start at the same point for everybody, and yours are left where they were.
    """
    arguments = copy.deepcopy(case)
    states = random.getstate(), torch.get_rng_state()
    random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed would also touch every GPU
    try:
        result = exercise.run(function, *arguments)
    except Exception as error:  # whatever a learner's code raises is an answer to explain
        return error
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
    if difference(case, arguments):
        return InputChanged()
    return result


def examine(exercise: Exercise, function: Callable, seed: int = SEED) -> str | None:
    """Return what is wrong with the function, or None."""
    cases = exercise.cases(seed)
    mine = [outcome(exercise, function, case) for case in cases]
    for number, result in enumerate(mine, start=1):
        if isinstance(result, NotImplementedError):
            return NOT_WRITTEN
        if exercise.judge and isinstance(result, Exception):
            return f"Case {number} of {len(cases)}: {explain(result)}"
    faults = judged(exercise, cases, mine) if exercise.judge else compared(exercise, cases, mine)
    if not any(faults):
        return None
    for mistake in exercise.mistakes:
        if all(not difference(outcome(exercise, mistake, c), m) for c, m in zip(cases, mine)):
            return sentence(mistake)
    first = next(i for i, fault in enumerate(faults) if fault)
    if exercise.judge:
        return faults[first]
    return (
        f"Case {first + 1} of {len(cases)}: {faults[first]}\n  {'input':>12}: {show(cases[first])}"
    )


def compared(exercise: Exercise, cases: list[Case], results: list[Any]) -> list[str | None]:
    """Return for every case how the result differs from the solution's."""
    right = [outcome(exercise, exercise.solution, case) for case in cases]
    return [difference(r, m) for r, m in zip(right, results)]


def judged(exercise: Exercise, cases: list[Case], results: list[Any]) -> list[str | None]:
    """Return the judge's complaint; a result that it cannot even read is shown with a sample."""
    try:
        return [exercise.judge(cases, results)]
    except Exception:
        sample = outcome(exercise, exercise.solution, cases[0])
        return ["the check cannot read your result." + beside(sample, results[0], "of this form")]


def difference(right: Any, mine: Any) -> str | None:
    """Return how two values differ (type, then shape, then values), or None if they agree."""
    if isinstance(mine, Exception):
        return None if type(right) is type(mine) else explain(mine)
    if isinstance(right, float) and isinstance(mine, int):
        mine = float(mine)
    if type_name(right) != type_name(mine):
        forgot = " Did you forget to return?" if mine is None else ""
        return f"expected {type_name(right)}, yours is {type_name(mine)}.{forgot}" + beside(
            right, mine
        )
    if isinstance(right, Tensor):
        return tensor_difference(right, mine)
    if isinstance(right, dict):
        if right.keys() != mine.keys():
            return "the keys differ." + beside(list(right), list(mine))
        return first_difference({f"[{k!r}]": (v, mine[k]) for k, v in right.items()})
    if isinstance(right, list | tuple):
        if len(right) != len(mine):
            return f"expected {len(right)} items, yours has {len(mine)}." + beside(right, mine)
        fault = first_difference({f"[{i}]": p for i, p in enumerate(zip(right, mine))})
        flat = not any(isinstance(item, Tensor | list | tuple | dict) for item in right)
        return "the items differ." + beside(right, mine) if fault and flat else fault
    if isinstance(right, float):
        same = math.isclose(right, mine, rel_tol=1e-5, abs_tol=1e-9)
        same = same or (math.isnan(right) and math.isnan(mine))
    else:
        same = right is mine or right == mine
    return None if same else "another value." + beside(right, mine)


def first_difference(pairs: dict[str, tuple[Any, Any]]) -> str | None:
    """Return the first difference among named pairs of values, with its place."""
    for place, (right, mine) in pairs.items():
        fault = difference(right, mine)
        if fault:
            return f"at {place}: {fault}"
    return None


def tensor_difference(right: Tensor, mine: Tensor) -> str | None:
    """Return how two tensors differ: shape, then dtype, then values."""
    if right.shape != mine.shape:
        return f"expected the shape {tuple(right.shape)}, yours is {tuple(mine.shape)}."
    if right.dtype != mine.dtype:
        return f"the shape is right; expected the dtype {right.dtype}, yours is {mine.dtype}."
    a, b = right.detach().double(), mine.detach().double()
    exact = not right.is_floating_point()
    relative = 0 if exact else 1e-4 if right.dtype.itemsize >= 4 else 0.02
    close = torch.isclose(a, b, rtol=relative, atol=0 if exact else 1e-6, equal_nan=True)
    if close.all():
        return None
    if not right.ndim:
        return "another value." + beside(a, b)
    place = (~close).nonzero()[0].tolist()
    wrong = f"{int((~close).sum())} of {close.numel()} values differ, first at {place}"
    return f"the shape is right, {wrong}." + beside(a[tuple(place)], b[tuple(place)])


def type_name(value: Any) -> str:
    """Return the name of the kind of value; kinds that may stand for each other share one."""
    kinds = {Tensor: "a tensor", dict: "a dict", bool: "a bool", int: "an int", float: "a float"}
    name = next((kinds[k] for k in kinds if isinstance(value, k)), None)
    return name or f"a {type(value).__name__}" if value is not None else "None"


def explain(error: Exception) -> str:
    """Return what an exception in a learner's function means, with the line that raised it."""
    if isinstance(error, InputChanged):
        return "your function changes its input; leave it as it is and work on a copy."
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if FOLDER not in Path(frame.filename).parents]
    line = f" Look at the line `{mine[0].line}`." if mine and mine[0].line else ""
    return f"your function raises {type(error).__name__}: {str(error).rstrip('.')}.{line}"


class Short(reprlib.Repr):
    """`repr` in one short line; tensors with many numbers by their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxlist = self.maxtuple = self.maxdict = 12

    def repr_float(self, value: float, level: int) -> str:
        return f"{value:.6g}"

    def repr_Tensor(self, value: Tensor, level: int) -> str:  # the name is reprlib's
        if value.numel() > 8:
            return f"tensor of shape {tuple(value.shape)}"
        return self.repr1(value.tolist(), level)


show = Short().repr


def beside(right: Any, mine: Any, label: str = "expected") -> str:
    """Return expected and given under each other."""
    return f"\n  {label:>12}: {show(right)}\n  {'yours':>12}: {show(mine)}"


# What a learner calls


def check(name: str, function: Callable, record: bool = True) -> None:
    """Say whether your function solves the exercise, and if not, which mistake it makes.

    Args:
        record: remember a solved exercise for `progress()`.
    """
    exercise = find(name)
    fault = examine(exercise, function)
    if fault:
        print(f"{'○' if fault == NOT_WRITTEN else '✗'} {name}: {fault}")
        return
    print(f"✓ {name}: solved.")
    if exercise.discussion:
        print("\n" + exercise.discussion.strip())
    if record:
        PROGRESS_FILE.write_text(json.dumps(sorted({*solved(), name}), indent=1) + "\n")


def hint(name: str, level: int = 1) -> None:
    """Print hint number `level` of an exercise; 1 is the gentlest."""
    hints = find(name).hints
    if not 1 <= level <= len(hints):
        print(
            f"{name} has hints 1 to {len(hints)}. After that, unfold the solution under the cell."
        )
        return
    more = f'  (more: hint("{name}", {level + 1}))' if level < len(hints) else ""
    print(f"Hint {level} of {len(hints)}: {hints[level - 1]}{more}")


def solved() -> set[str]:
    """Return the names of the exercises solved so far. A damaged file counts as none."""
    try:
        return set(json.loads(PROGRESS_FILE.read_text()))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return set()


def progress() -> None:
    """Print what is done, topic by topic, and what is next."""
    done = solved()
    left = []
    for stem, topic in topics().items():
        names = [e.name for e in topic.EXERCISES]
        left += [(stem, name) for name in names if name not in done]
        marks = "".join("■" if name in done else "□" for name in names)
        print(f"{stem:<16} {marks:<6} {sum(n in done for n in names)} of {len(names)}")
    print(f"\nNext: {left[0][1]}, in {left[0][0]}.ipynb" if left else "\nAll done. Well done!")
