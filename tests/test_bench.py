import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from minimind import UserError, cli
from minimind import bench as bench_module
from minimind.bench import (
    bench,
    bench_generate,
    bench_text,
    card_figures,
    chat_figures,
    flops_per_token,
    interleaved,
    memory_figures,
    peak_flops,
    sampling_text,
    step_figures,
    step_ratios,
    time_figures,
    transformers_twin,
    utilisation_figure,
)
from minimind.config import stage_config
from minimind.precision import pick_dtype


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"qk_norm": True, "tie_word_embeddings": False}])
def test_the_comparison_is_with_the_same_model(settings, small_model):
    model, ids = small_model(**settings), torch.randint(120, (2, 9))
    torch.testing.assert_close(transformers_twin(model)(ids).logits, model(ids), atol=1e-5, rtol=0)


def test_both_sides_sample_as_many_tokens(monkeypatch):
    sampled = []
    import transformers

    generate = transformers.GenerationMixin.generate

    def watched(self, ids, **settings):
        output = generate(self, ids, **settings)
        sampled.append((len(output), output.shape[1] - ids.shape[1]))
        return output

    monkeypatch.setattr(transformers.GenerationMixin, "generate", watched)
    config = stage_config("pretrain", "tiny")
    found = bench_generate(config, vocab_size=64, rows=16, length=4, new_tokens=5, repeats=1)
    assert set(sampled) == {(16, 5)} and [speed.prompts for speed in found] == [16, 2]
    assert all(speed.ours > 0 and speed.transformers > 0 for speed in found)
    assert sampling_text(found).count("times as fast") == 2


def test_experts_are_not_compared(small_model):
    with pytest.raises(UserError, match="use_moe"):
        transformers_twin(small_model(use_moe=True, qk_norm=True))


TINY = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    batch_size=2,
    max_seq_len=12,
    device="cpu",
)


@pytest.fixture
def quick(monkeypatch):
    """The compiler does nothing and the second process is this one; chats are padded to a little."""

    class Here:
        def Pool(self, count):
            return nullcontext(SimpleNamespace(apply=lambda work, given: work(*given)))

    monkeypatch.setattr(bench_module, "compile_blocks", lambda model, config: 1.5)
    monkeypatch.setattr(bench_module, "get_context", lambda kind: Here())
    monkeypatch.setattr(bench_module, "matmul_peak", lambda device, dtype: 5e10)


def test_everything_is_measured_in_one_run(quick):
    config = stage_config("pretrain", dtype="bfloat16", compile=1, gradient_checkpointing=1, **TINY)
    found = bench(config, vocab_size=64, repeats=1)
    parts = {figure.part for figure in found}
    assert parts == {"training step", "peak memory", "chats", "utilisation", "time"}
    values = {figure.name: figure.value for figure in found}
    kinds = ["ours", "transformers"] if pick_dtype("auto", torch.device("cpu")) == torch.float32 else [
        "ours", "transformers", "compiled", "checkpointed"]  # fmt: skip
    assert all(f"{kind}, {found[0].name.split(', ')[1]}" in values for kind in kinds[:2])
    assert values["compile time"] == 1.5
    gap = next(figure.note for figure in found if "transformers, float32" in figure.name and "/" in figure.name)  # fmt: skip
    assert float(gap.split()[-1]) < 1e-4
    text = bench_text(found)
    assert "useful tokens/s" in text and "100M tokens" in text and "large matrix product" in text


def test_ratios_are_printed_plainly_for_equal_precision():
    times = {"ours, float32": 3.0, "transformers, float32": 4.5, "ours, bfloat16": 0.5,
             "transformers, bfloat16": 1.0, "compiled, bfloat16": 0.25}  # fmt: skip
    found = list(step_ratios(times, "bfloat16", 2e-6))
    assert {figure.name: figure.value for figure in found} == {
        "ours, float32 / transformers, float32": 1.5,
        "ours, bfloat16 / transformers, bfloat16": 2.0,
        "ours, bfloat16 / ours, float32": 6.0,
        "compiled, bfloat16 / ours, bfloat16": 2.0,
    }
    line = next(
        line for line in bench_text(found).splitlines() if "bfloat16 / ours, float32" in line
    )
    assert line.split()[-2:] == ["6.00", "times"]


def test_a_gpu_gets_a_batch_that_fills_it(monkeypatch):
    for there, rows in ((True, 32), (False, 2)):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        assert cli.parse(cli.Bench, [], "bench").batch_size == rows


def test_what_is_left_out_is_not_measured(quick):
    config = stage_config("pretrain", dtype="float32", compile=0, gradient_checkpointing=0, **TINY)
    names = {figure.name for figure in step_figures(config, 64, 1)}
    assert names == {
        "ours, float32",
        "transformers, float32",
        "ours, float32 / transformers, float32",
    }


def test_without_a_compiler_the_rest_is_measured(quick, monkeypatch):
    def none_here(model, config):
        raise UserError("no compiler")

    monkeypatch.setattr(bench_module, "compile_blocks", none_here)
    config = stage_config("pretrain", dtype="float32", compile=1, **TINY)
    found = {figure.name: figure for figure in step_figures(config, 64, 1)}
    assert found["compiled"].note == "no compiler" and found["ours, float32"].value > 0


def test_sides_take_turns_and_medians_count():
    calls, sleeps = [], iter([0.05, 0.0, 0.0, 0.03])
    sides = {
        "a": lambda: calls.append("a"),
        "b": lambda: calls.append("b") or time.sleep(next(sleeps)),
    }
    found = interleaved(sides, 3, torch.device("cpu"))
    assert calls == ["a", "b", "b", "a"] * 2 and found["b"] < 0.02


def test_the_table_of_cards_and_its_utilisation(quick, small_model):
    cpu = torch.device("cpu")
    peaks = {card: peak_flops(cpu, torch.bfloat16, card)[0] / 1e12 for card in (
        "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA L4", "NVIDIA L40S")}  # fmt: skip
    assert list(peaks.values()) == [989, 756, 312, 121, 362]
    for other in ("NVIDIA L40", "NVIDIA GeForce RTX 3090 Ti", ""):
        assert peak_flops(cpu, torch.bfloat16, other)[0] == 5e10
    assert peak_flops(cpu, torch.float32, "NVIDIA L4")[0] == 5e10  # no figure for float32: measured
    config = stage_config("pretrain", dtype="bfloat16", compile=1, **TINY)
    found = card_figures(config, 64, 1, "NVIDIA A100", {"one": (32, 1), "two": (64, 2)})
    assert [(f.part, f.name) for f in found] == [
        ("card", "one"), ("card", "one, peak memory"), ("utilisation", "one"),
        ("card", "two"), ("card", "two, peak memory"), ("utilisation", "two")]  # fmt: skip
    model = small_model()
    figure = utilisation_figure("x", model, 12, 1e6, (1e13, "a card"))
    assert figure.value == pytest.approx(flops_per_token(model, 12) * 1e6 / 1e13 * 100)


def test_memory_is_measured_in_a_process_of_its_own():
    config = stage_config("pretrain", dtype="float32", **TINY)
    ballast = torch.ones(2**28)  # 1 GiB that is not the child's
    (figure,) = memory_figures(config, 64)
    assert 50 < figure.value < ballast.nbytes / 2**20


def test_padding_costs_what_it_should(monkeypatch):
    """On a clock that counts positions: what the rows' own arithmetic gives."""
    positions = []

    def counted(sides, repeats, device):
        times = {}
        for name, work in sides.items():
            positions.clear()
            work()
            times[name] = sum(positions)
        return times

    monkeypatch.setattr(bench_module, "interleaved", counted)
    monkeypatch.setattr(
        bench_module, "optimizer_step", lambda run, group, *_: positions.append(group[0]["input_ids"].numel())
    )  # fmt: skip
    ours, padded, times = chat_figures(stage_config("pretrain", dtype="float32", **TINY), 64, 1)
    assert 0.9 < ours.value <= 1 and 0 < padded.value < 1 / 8
    assert times.value == pytest.approx(ours.value / padded.value) and times.value > 8


def test_useful_tokens_take_less_time_than_padding(quick):
    *_, times = chat_figures(stage_config("pretrain", dtype="float32", **TINY), 64, 3)
    assert times.value > 8


def test_the_time_table():
    times = list(time_figures(1000.0, "ours"))
    assert [round(figure.value, 1) for figure in times] == [16.7, 166.7, 1666.7]
