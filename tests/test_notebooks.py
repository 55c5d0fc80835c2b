"""What every stored notebook keeps to; nbval runs them."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_of_one_clean_run(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [
        c for c in notebook["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()
    ]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert "widgets" not in notebook["metadata"]
    outputs = [o for c in code for o in c["outputs"]]
    assert outputs and not [o for o in outputs if o["output_type"] == "error"]
    assert not re.search(r"site-packages|/home/|/root/|/tmp/", json.dumps(outputs))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_stay_short_and_links_lead_somewhere(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            assert source.count("\n") < 40
        for target in re.findall(r"\]\((?!http|#)([^)]+)\)", source):
            if cell["cell_type"] == "markdown":
                assert (path.parent / target.split("#")[0]).exists(), target
