"""Make the exercise notebooks and their solutions from `topics/`.

python exercises/build.py          write exercises/NN_topic.ipynb and solutions/NN_topic.ipynb
python exercises/build.py --check  only say whether the stored ones are what the sources give

The same sources always give the same bytes: cells are named, nothing is executed.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from types import ModuleType

from checks import FOLDER, Exercise, topics

SOLUTION = re.compile(r"( *)### BEGIN SOLUTION\n(.*?) *### END SOLUTION\n", re.DOTALL)

SETUP = """\
import os
import subprocess
import sys
from pathlib import Path

if "google.colab" in sys.modules and not Path("minimind-course").exists():
    OWNER = "OWNER"  # whose repository did you open this from?
    address = f"https://github.com/{OWNER}/minimind-course"
    subprocess.run(["git", "clone", "--depth", "1", address], check=True)

places = [Path.cwd(), Path.cwd().parent, *Path.cwd().glob("*/exercises")]
folder = next((p.resolve() for p in places if (p / "checks.py").is_file()), None)
if folder is None:
    raise FileNotFoundError("checks.py is not here: open this notebook in the folder `exercises`.")
sys.path[:0] = [str(folder), str(folder.parent)]

from checks import check, hint, progress
"""

HEADER = """\
# Exercises {number} · {title}

**You practise** {practises}

**Time** about {minutes} minutes for {count} exercises, the last one open-ended. **Lesson**
[notebooks/{stem}.ipynb]({up}notebooks/{stem}.ipynb). {other}

Replace `raise NotImplementedError` with your code and run the cell. The check tells you which
mistake you made, if it is one that people often make, and otherwise shows what was expected beside
what you returned. `hint(name, 1)` gives a nudge, higher levels more; the solution is folded under
each cell. Difficulty and importance run from 1 to 5.
"""


def stub(exercise: Exercise) -> str:
    """Return the source of the solution with what the learner must write taken out."""
    source = inspect.getsource(exercise.solution)
    if not SOLUTION.search(source):
        raise ValueError(f"{exercise.name} has no ### BEGIN SOLUTION … ### END SOLUTION.")
    return SOLUTION.sub(r"\1raise NotImplementedError\n", source)


def solution(exercise: Exercise) -> str:
    """Return the source of the solution without the markers."""
    return SOLUTION.sub(r"\2", inspect.getsource(exercise.solution))


def imports(topic: ModuleType) -> str:
    """Return the import lines of a topic file, as far as a learner may need them."""
    tree = ast.parse(inspect.getsource(topic))
    nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    lines = [
        ast.unparse(n) for n in nodes if getattr(n, "module", "") not in ("checks", "__future__")
    ]
    return "\n".join(lines)


def markdown(name: str, text: str) -> dict:
    """Return a markdown cell."""
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": to_lines(text)}


def code(name: str, text: str) -> dict:
    """Return a code cell that has not been run."""
    return {"cell_type": "code", "execution_count": None, "id": name, "metadata": {},
            "outputs": [], "source": to_lines(text)}  # fmt: skip


def to_lines(text: str) -> list[str]:
    """Return a cell's text as a notebook stores it."""
    return text.strip().splitlines(keepends=True)


def exercise_cells(number: int, exercise: Exercise, solved: bool) -> list[dict]:
    """Return the cells of one exercise: statement, stub or solution with its check, solution."""
    name = exercise.name
    cell_id = name.replace("_", "-")
    head = (
        f"## {number}. {exercise.title}\n\n"
        f"Difficulty {'●' * exercise.difficulty}{'○' * (5 - exercise.difficulty)} · "
        f"importance {'●' * exercise.importance}{'○' * (5 - exercise.importance)} · "
        f"{exercise.minutes} minutes\n\n"
    )
    statement = markdown(f"{cell_id}-statement", head + exercise.statement.strip())
    if solved:
        answer = f'{solution(exercise)}\n\ncheck("{name}", {name}, record=False)'
        return [statement, code(f"{cell_id}-code", answer)]
    levels = ", ".join(str(i + 1) for i in range(len(exercise.hints)))
    question = (
        f'{stub(exercise)}\n\ncheck("{name}", {name})\n# hint("{name}", 1)  # levels {levels}'
    )
    folded = (
        "<details><summary>Solution</summary>\n\n"
        f"```python\n{solution(exercise).strip()}\n```\n\n{exercise.discussion.strip()}\n\n</details>"
    )
    return [
        statement,
        code(f"{cell_id}-code", question),
        markdown(f"{cell_id}-solution", folded),
    ]


def notebook(stem: str, topic: ModuleType, solved: bool) -> dict:
    """Return a topic's notebook, with stubs or with solutions."""
    up = "../../" if solved else "../"
    header = HEADER.format(
        number=stem[:2] + (", solved" if solved else ""), title=topic.TITLE, stem=stem, up=up,
        practises=topic.PRACTISES, count=len(topic.EXERCISES),
        minutes=sum(e.minutes for e in topic.EXERCISES),
        other=f"**Exercises** [unsolved](../{stem}.ipynb)." if solved
        else f"**Solutions** [solved](solutions/{stem}.ipynb).",
    )  # fmt: skip
    cells = [markdown("header", header), code("setup", f"{SETUP}\n{imports(topic)}")]
    for number, exercise in enumerate(topic.EXERCISES, start=1):
        cells += exercise_cells(number, exercise, solved)
    if not solved:
        cells.append(code("progress", "progress()"))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def build() -> dict[str, str]:
    """Return the text of every notebook by its path inside `exercises/`."""
    built = {}
    for stem, topic in topics().items():
        for folder, solved in (("", False), ("solutions/", True)):
            text = json.dumps(notebook(stem, topic, solved), indent=1, ensure_ascii=False)
            built[f"{folder}{stem}.ipynb"] = text + "\n"
    return built


def stale() -> list[str]:
    """Return the stored notebooks that are not what the sources give."""
    built = build()
    stored = [*FOLDER.glob("*.ipynb"), *FOLDER.glob("solutions/*.ipynb")]
    extra = {path.relative_to(FOLDER).as_posix() for path in stored} - built.keys()
    changed = [
        name for name, text in built.items()
        if not (FOLDER / name).is_file() or (FOLDER / name).read_text(encoding="utf-8") != text
    ]  # fmt: skip
    return sorted([*changed, *extra])


def main() -> None:
    """Write the notebooks, or with --check compare them."""
    if "--check" in sys.argv[1:]:
        wrong = stale()
        if wrong:
            sys.exit(f"Out of date: {', '.join(wrong)}. Run: python exercises/build.py")
        print("The notebooks are what the sources give.")
        return
    for name, text in build().items():
        (FOLDER / name).parent.mkdir(exist_ok=True)
        (FOLDER / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"exercises/{name}")


if __name__ == "__main__":
    main()
