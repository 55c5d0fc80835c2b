import json
import math

import pytest

from minimind import UserError
from minimind.course import ABILITIES, STAGES_IN_ORDER, abilities, course, load_or_train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("course")


@pytest.fixture(scope="module")
def report(folder):
    return course("tiny", out_dir=str(folder))


def test_the_report_has_every_field(report, folder):
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    assert [stage["stage"] for stage in report["stages"]] == list(STAGES_IN_ORDER)
    for stage in report["stages"]:
        assert stage["seconds"] > 0 and stage["samples"] and stage["measures"]
        for measure in stage["measures"].values():
            assert set(measure) >= {"before", "after", "baseline", "better", "held_out_examples"}
            assert measure["better"] in ("lower", "higher") and measure["held_out_examples"] > 0
    assert report["total_seconds"] >= sum(stage["seconds"] for stage in report["stages"]) - 1


def test_even_the_tiny_run_learns(report):
    bits = report["stages"][0]["measures"]["bits_per_byte"]
    assert bits["after"] < 0.8 * bits["before"]
    assert bits["baselines"]["5-gram"] < bits["baselines"]["unigram"]


def test_the_page_and_the_picture_are_written(report, folder):
    page = (folder / "report.md").read_text()
    assert "exact_match_person_unseen" in page and "## Chat" in page
    assert (folder / "report.png").stat().st_size > 5000


def test_the_picture_has_every_figure_where_it_was_measured(report):
    rows = abilities(report)
    measures = {stage["stage"]: stage["measures"] for stage in report["stages"]}
    for ability, names in ABILITIES.items():
        assert set(names) <= set(rows[ability]), "a measure of this name is not in the report"
    dpo, reason = measures["dpo"]["sft_exact_match"], measures["reason"]["answer"]
    assert rows["questions"]["dpo"][:2] == (dpo["after"], dpo["baseline"])
    before, baseline, raised = rows["chains of 2–5 operations"]["dpo"]
    assert before == reason["before"] and math.isnan(baseline) and not raised
    bits = measures["pretrain"]["bits_per_byte"]
    assert rows["text: bits saved of 8"]["pretrain"] == (
        1 - bits["after"] / 8, 1 - bits["baseline"] / 8, True
    )  # fmt: skip


def test_a_weight_is_found_or_made(report, folder, here):
    model, _ = load_or_train("full_sft", "tiny")
    assert (here / "out/tiny/pretrain_64.pth").is_file() and (
        here / "out/tiny/full_sft_64.pth"
    ).is_file()
    made = (here / "out/tiny/full_sft_64.pth").stat().st_mtime_ns
    again, _ = load_or_train("full_sft", "tiny")
    assert (here / "out/tiny/full_sft_64.pth").stat().st_mtime_ns == made
    assert again.config == model.config
    with pytest.raises(UserError, match="No stage saves"):
        load_or_train("nothing", "tiny")
