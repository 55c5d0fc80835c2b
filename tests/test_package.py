"""The project's own promises: light import, one list of packages, one direction of imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "minimind").rglob("*.py"))


def requirements():
    """The strings of pyproject's core, course and test lists (tomllib is not in Python 3.10)."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = [
        re.search(rf"^{name} = (\[.*?\])", text, re.M | re.S).group(1)
        for name in ("dependencies", "course", "test")
    ]
    return [item for one in lists for item in ast.literal_eval(one)]


def test_conda_and_pip_ask_for_the_same_packages():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(item["pip"] for item in conda if isinstance(item, dict))
    assert [item for item in pip if not item.startswith("--editable")] == requirements()


def test_every_package_is_pinned_for_our_own_installs():
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    assert {re.match(r"[\w-]+", item).group().lower() for item in requirements()} <= pinned


def test_importing_minimind_is_quick():
    script = (
        "import time, torch; t = time.perf_counter(); import minimind; print(time.perf_counter() - t);"
        "import sys; assert not {'matplotlib', 'IPython', 'tyro', 'transformers'} & set(sys.modules)"
    )
    times = [float(subprocess.check_output([sys.executable, "-c", script])) for _ in range(5)]
    assert min(times) < 0.3


ORDER = """
    errors presets config precision muon tokenizer data losses feed model distributed lora reader generate checkpoint corpus rewards
    stages.task stages.common stages.pretrain stages.sft stages.lora stages.dpo stages.reason stages.reward stages.rl
    stages.grpo stages.spo stages.distill stages tracking guard compiling trainer evaluate measures baselines comparisons
    course interop bench gguf scoring serve download cli
""".split()


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: p.stem)
def test_imports_run_one_way(path):
    name = ".".join(path.relative_to(ROOT / "minimind").with_suffix("").parts).removesuffix(
        ".__init__"
    )
    if name not in ORDER:
        return  # the front of the package, its entry point, plots: they may look at everything
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("minimind."):
            module = node.module.removeprefix("minimind.")
            assert module == "plots" or ORDER.index(module) < ORDER.index(name), (
                f"{name} imports {module}"
            )


def test_functions_stay_short():
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def lines_of_code(path):
    """Lines that hold code: no blank lines, comments or docstrings."""
    source = path.read_text()
    texts = {
        number
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for number in range(node.lineno, node.end_lineno + 1)
    }
    lines = enumerate(source.splitlines(), start=1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in texts
        for number, line in lines
    )


def test_the_package_stays_small():
    """What trains and samples; beside it what measures, what full scale needs, the ways in and out."""
    beside = {"evaluate", "measures", "comparisons", "baselines", "course", "plots"}
    beside |= {"distributed", "compiling", "feed", "guard", "tracking", "corpus", "download"}
    beside |= {"interop", "bench", "gguf", "scoring", "serve", "cli"}
    core = [path for path in PACKAGE if path.stem not in beside]
    assert sum(map(lines_of_code, core)) <= 3500
    assert sum(map(lines_of_code, PACKAGE)) <= 6800
