import json

import pytest
import torch
from helpers import SMALL, chats, write_lines

from minimind import UserError, load, measures, train
from minimind.checkpoint import load_sidecar, read_tensors
from minimind.config import data_samples
from minimind.lora import adapters, trained_share

SETTINGS = {
    **SMALL,
    "log_interval": 2,
    "accumulation_steps": 1,
    "epochs": 1,
    "max_seq_len": 48,
    "eval_interval": 99,
    "tokenizer_path": str(data_samples("tokenizer.json")),
}
LORA = dict(lora_r=3, lora_alpha=5.0, target_modules=("k_proj", "up_proj"), learning_rate=5e-3)
IDS = torch.arange(3, 20)[None]


def make(folder, stage="lora", **more):
    data = write_lines(folder / "chats.jsonl", chats())
    settings = {**SETTINGS, **(LORA if stage == "lora" else {}), **more}
    return train(stage, data_path=data, eval_data_path=data, out_dir=str(folder), **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    make(folder, "sft", from_weight="none")
    return folder


@pytest.fixture(scope="module")
def result(folder):
    return make(folder)


def test_the_adapter_is_saved_alone_with_what_it_needs(result, folder):
    state, sidecar = read_tensors(result.weight_path), load_sidecar(result.weight_path)
    assert len(state) == 2 * 2 * 2 and all(".lora_" in name for name in state)
    assert sidecar["lora"]["r"] == 3 and sidecar["lora"]["alpha"] == 5.0
    assert sidecar["lora"]["target_modules"] == ["k_proj", "up_proj"]
    assert sidecar["lora"]["base_weight"] == "full_sft_32.pth"
    assert sidecar["lora"]["trained_share"] == trained_share(result.model)
    assert [stage["stage"] for stage in sidecar["stages"]] == ["sft", "lora"]
    assert result.weight_path.stat().st_size < (folder / "full_sft_32.pth").stat().st_size / 4


def test_only_the_adapter_was_trained(result, folder):
    base, trained = read_tensors(folder / "full_sft_32.pth"), result.model.state_dict()
    assert all(torch.equal(trained[name], base[name]) for name in base)
    assert all(adapter.update().abs().max() > 1e-4 for _, adapter in adapters(result.model))
    assert result.history[-1]["heldout_loss"] < result.history[0]["heldout_loss"] - 0.05


def test_loading_finds_the_base_and_merges(result, folder):
    model, _ = load("lora", out_dir=folder)
    assert not list(adapters(model))
    assert (model(IDS) - result.model(IDS)).abs().max() < 1e-5
    assert not torch.allclose(model(IDS), load("full_sft", out_dir=folder)[0](IDS), atol=1e-3)


def test_a_later_stage_starts_from_the_merged_model(result, folder):
    later = make(folder, "sft", from_weight="lora", save_weight="later", learning_rate=1e-9)
    assert (later.model(IDS) - result.model(IDS)).abs().max() < 1e-4
    assert "lora" not in load_sidecar(later.weight_path)


def test_a_base_in_another_folder_is_found_and_the_two_may_move_together(folder, tmp_path):
    (tmp_path / "old/bases").mkdir(parents=True)
    for suffix in ("pth", "json"):
        source = folder / f"full_sft_32.{suffix}"
        (tmp_path / f"old/bases/full_sft_32.{suffix}").write_bytes(source.read_bytes())
    trained = make(tmp_path / "old", from_weight=str(tmp_path / "old/bases/full_sft_32.pth"))
    (tmp_path / "old").rename(tmp_path / "new")
    model, _ = load("lora", out_dir=tmp_path / "new")
    assert (model(IDS) - trained.model(IDS)).abs().max() < 1e-5


def test_a_broken_run_goes_on_where_it_stopped(result, folder):
    class Stop(Exception):
        pass

    def stop(step, model):
        if step == 5:
            raise Stop

    data = str(folder / "chats.jsonl")
    settings = {**SETTINGS, **LORA, "data_path": data, "eval_data_path": data, "out_dir": str(folder), "save_interval": 2,
                "save_weight": "again"}  # fmt: skip
    with pytest.raises(Stop):
        train("lora", callback=stop, **settings)
    again = train("lora", from_resume=1, **settings)
    one, two = read_tensors(result.weight_path), read_tensors(again.weight_path)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_missing_base_says_how_to_make_it(folder, result, tmp_path):
    with pytest.raises(UserError, match=r"no weight .*full_sft_32.pth.*minimind sft"):
        make(tmp_path)
    for suffix in (".pth", ".json"):
        source = result.weight_path.with_suffix(suffix)
        (tmp_path / source.name).write_bytes(source.read_bytes())
    with pytest.raises(UserError, match=r"base weight .*full_sft_32.pth is missing.*minimind sft"):
        load("lora", out_dir=tmp_path)


def test_another_base_under_the_same_name_is_refused(folder, result, tmp_path):
    make(tmp_path, "sft", from_weight="none", seed=7)
    for suffix in (".pth", ".json"):
        source = result.weight_path.with_suffix(suffix)
        (tmp_path / source.name).write_bytes(source.read_bytes())
    with pytest.raises(UserError, match=r"trained on another .*full_sft_32.pth.*minimind lora"):
        load("lora", out_dir=tmp_path)


def test_an_adapter_that_is_not_what_its_sidecar_says_is_refused(result, folder, tmp_path):
    for path in folder.glob("*.*"):
        if path.stem in ("full_sft_32", "lora_32"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    sidecar = load_sidecar(tmp_path / "lora_32.pth")
    for entry in ({"r": 4}, {"target_modules": ["q_proj"]}):
        text = json.dumps({**sidecar, "lora": {**sidecar["lora"], **entry}})
        (tmp_path / "lora_32.json").write_text(text)
        with pytest.raises(UserError, match=r"lora_32.pth does not fit this model"):
            load("lora", out_dir=tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(lora_r=0), "lora_r=0"),
        (dict(target_modules=("q_prj",)), "Did you mean 'q_proj'"),
        (dict(from_weight="none"), "from_weight=none is none"),
        (dict(save_weight="full_sft"), "is the base itself"),
    ],
)
def test_settings_that_cannot_work_are_refused(folder, settings, words):
    with pytest.raises(UserError, match=words):
        make(folder, **settings)


def test_the_measures_tell_manner_from_knowledge(monkeypatch, tokenizer, small_model):
    """A model that signs everything but knows nothing, and one that answers right and unsigned."""
    signature = " Kind regards from Mimi."

    def fake(reply):
        return lambda model, tokenizer, rows: [
            measures.Answer("", right, reply(right.removesuffix(signature)))
            for right in (row["conversations"][-1]["content"] for row in rows)
        ]

    scores = {}
    for name, reply in (("signs", lambda right: "No." + signature), ("knows", lambda right: right),
                        ("both", lambda right: right + signature)):  # fmt: skip
        monkeypatch.setattr(measures, "answers", fake(reply))
        figures, found = measures.measure_lora(small_model(), tokenizer, 40)
        scores[name] = [m.value for m in figures.values()]
        assert len(found) == 40
    assert list(figures) == ["persona", "persona_signed", "sft_exact_match"]
    assert scores == {"signs": [0, 1, 0], "knows": [0, 0, 1], "both": [1, 1, 1]}
