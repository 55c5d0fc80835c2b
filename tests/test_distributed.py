"""Two processes must train as one does. One launch of torchrun serves all tests: it costs seconds."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import SMALL, chats, ends_now_and_then, texts, write_lines

import minimind
from minimind import MiniMind, UserError, distributed
from minimind.checkpoint import read_tensors, save_weight
from minimind.config import data_samples
from minimind.data import read_jsonl
from minimind.stages.reward import add_score

# Every stage, with a number of batches that two processes cannot share evenly.
# Where a gradient is almost 0, Adam makes a step of rounding; so the learning rate of RL is small.
RL = {"epochs": 1, "batch_size": 2, "max_new_tokens": 8, "max_seq_len": 80, "reasoning": 0,
      "learning_rate": 2e-4}  # fmt: skip
STAGES = {
    "pretrain": {"epochs": 1, "from_weight": "none", "eval_interval": 2},
    "sft": {"epochs": 1.2, "optimizer": "muon"},
    "lora": {"epochs": 0.6},
    "dpo": {"epochs": 1.1, "max_seq_len": 80, "sft_coef": 0.2},
    "reward": {"epochs": 0.6, "max_seq_len": 80},
    "reason": {"epochs": 0.6, "max_seq_len": 80},
    "distill": {"epochs": 0.6, "from_weight": "none", "student_hidden_size": 32, "student_num_layers": 1,
                "teacher_hidden_size": 32, "teacher_num_layers": 2},
    "grpo": {**RL, "num_generations": 3, "num_iterations": 2},
    "spo": RL,
}  # fmt: skip
WEIGHTS = {"sft": "full_sft", "distill": "full_dist"}

SCRIPT = """
import json, os, signal, sys, time, minimind
from minimind import cli, distributed, guard
from torch.distributed import distributed_c10d

def stop(step, model):  # one process gets the signal; both must end, after the same step
    if step == 1 and distributed.rank() == 1: os.kill(os.getpid(), signal.SIGTERM)

jobs = json.load(open(sys.argv[1]))
for stage, settings in jobs["runs"]:
    stops = settings.pop("stops", False)
    try: minimind.train(stage, callback=stop if stops else None, **settings)
    except guard.Interrupted as error: assert stops and "after step 2" in str(error)

apart = {**jobs["apart"], "out_dir": f"apart_{distributed.rank()}"}  # each on a disk of its own
minimind.train("pretrain", **apart)
try: minimind.train("pretrain", **apart, from_resume=1)
except minimind.UserError as error: print(error, flush=True)

sys.argv[1:] = ["pretrain", "--data_path", "nowhere.jsonl"]
try: cli.main()
except SystemExit as error: print("code", error.code, flush=True)
distributed.wait()
if distributed.is_first(): distributed_c10d._get_default_store().delete_key("complaints")
distributed.wait()

def die(model):
    time.sleep(0.5)
    print("died at", time.time(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if distributed.rank() == 1: distributed.sum_gradients = die
sys.argv[1:] = jobs["last"]
cli.main()
"""


def write_data(folder):
    """Write data for every stage; some problems can be verified, the others need a reward model."""
    rows = {"pretrain": texts(30), "sft": chats(26)}
    for stage, count in {"dpo": 26, "reason": 26, "grpo": 9}.items():
        rows[stage] = read_jsonl(data_samples(f"{stage}.jsonl"), lambda row: None)[:count]
    for row in rows["grpo"][::2]:
        del row["answer"]
    files = {stage: write_lines(folder / f"{stage}.jsonl", found) for stage, found in rows.items()}
    same = {"lora": "sft", "distill": "sft", "reward": "dpo", "spo": "grpo"}
    return {**files, **{stage: files[other] for stage, other in same.items()}}


def write_weights(folder):
    """Write a weight to start from, the same for RL, and a random reward model; return the paths.

    In RL an answer must end now and then: all cut ones earn the same.
    """
    settings = {**SMALL, "data_path": write_lines(folder / "text.jsonl", texts(40, seed=3))}
    start = minimind.train("pretrain", tokenizer_path=str(data_samples("tokenizer.json")),
                           out_dir=str(folder / "start"), **settings)  # fmt: skip
    ends = MiniMind(replace(start.model.config, tie_word_embeddings=False))
    ends.load_state_dict(start.model.state_dict())
    ends_now_and_then(ends, start.tokenizer.eos_id, strength=1.0)
    save_weight(folder / "start/ends_32.pth", ends, start.tokenizer, [], {})
    judge = add_score(start.model)
    torch.nn.init.normal_(judge.score.weight, std=0.3)
    path = folder / "start/judge_32.pth"
    save_weight(path, judge, start.tokenizer, [], {})
    return str(start.weight_path), str(folder / "start/ends_32.pth"), str(path)


@dataclass
class Runs:
    """What one process and two processes made of the same settings."""

    folder: Path
    output: str
    code: int
    seconds_after_death: float
    settings: Callable[..., dict]

    def history(self, run, stage):
        lines = (self.folder / f"{run}/{WEIGHTS.get(stage, stage)}_32.log.jsonl").read_text()
        return [json.loads(line) for line in lines.splitlines()]

    def weight(self, run, stage):
        return read_tensors(self.folder / f"{run}/{WEIGHTS.get(stage, stage)}_32.pth")


class Stop(Exception):
    pass


def stop(step, model):
    if step == 3:
        raise Stop


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("many")
    data, (start, ends, judge) = write_data(folder), write_weights(folder)

    def settings(stage, run, accumulation_steps, **more):
        found = {**SMALL, "accumulation_steps": accumulation_steps, "save_interval": 2, "from_weight": start,
                 "out_dir": str(folder / run), "data_path": data[stage], "eval_data_path": data[stage],
                 **STAGES[stage], **more}  # fmt: skip
        if stage == "distill":
            found = {**found, "teacher_weight": start}
            del found["hidden_size"], found["num_hidden_layers"]
        if stage in ("grpo", "spo"):
            found = {**found, "from_weight": ends, "reward_model_path": judge}
        return found

    for stage in STAGES:
        minimind.train(stage, **settings(stage, "one", 2))
    minimind.train("pretrain", **settings("pretrain", "one_fsdp", 2, optimizer="adamw"))
    with pytest.raises(Stop):
        minimind.train("sft", callback=stop, **settings("sft", "one_then_two", 2))

    needs = {"out_dir": str(folder / "needs"), "epochs": 0.02, "teacher_weight": "pretrain"}
    jobs = [(stage, settings(stage, "two", 1)) for stage in STAGES]
    jobs += [
        ("pretrain", settings("pretrain", "two_fsdp", 1, fsdp=1, stops=True)),
        ("pretrain", settings("pretrain", "two_fsdp", 1, fsdp=1, from_resume=1)),
        ("sft", settings("sft", "one_then_two", 1, from_resume=1)),
        ("spo", settings("spo", "two_then_one", 1, stops=True)),
        ("distill", {"preset": "tiny", **needs}),
    ]
    apart, last = settings("pretrain", "apart", 1), settings("pretrain", "killed", 1)
    last = ["pretrain"] + [
        part for name, value in last.items() for part in (f"--{name}", str(value))
    ]
    (folder / "jobs.json").write_text(json.dumps({"runs": jobs, "apart": apart, "last": last}))
    (folder / "script.py").write_text(SCRIPT)
    launch = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "script.py", "jobs.json"], cwd=folder, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    ended = time.time()
    output = launch.stdout + launch.stderr
    assert "died at" in output, output
    died = float(launch.stdout.split("died at ")[1].split()[0])
    minimind.train("spo", **settings("spo", "two_then_one", 2, from_resume=1))
    return Runs(folder, output, launch.returncode, ended - died, settings)


def same_history(one, other):
    assert len(one) == len(other) >= 3
    for row, twin in zip(one, other, strict=True):
        assert row.keys() == twin.keys()
        for name in row.keys() - {"tokens_per_second", "rollout_share"}:
            assert row[name] == pytest.approx(twin[name], abs=1e-5), (name, row, twin)


def same_weight(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one_with_twice_the_accumulation(stage, runs):
    same_history(runs.history("one", stage), runs.history("two", stage))
    same_weight(runs.weight("one", stage), runs.weight("two", stage))
    start = runs.history("one", stage)[0]
    assert start["grad_norm"] > 0.01  # there was something to learn


def test_a_run_goes_on_with_another_number_of_processes(runs):
    for run, stage in (("one_then_two", "sft"), ("two_then_one", "spo")):
        same_history(runs.history("one", stage), runs.history(run, stage))
        same_weight(runs.weight("one", stage), runs.weight(run, stage))


def test_fsdp_trains_the_same_and_saves_whole_weights_even_if_it_was_resumed(runs):
    same_history(runs.history("one_fsdp", "pretrain"), runs.history("two_fsdp", "pretrain"))
    same_weight(runs.weight("one_fsdp", "pretrain"), runs.weight("two_fsdp", "pretrain"))


def test_a_teacher_that_is_absent_is_trained_by_all(runs):
    assert all(
        (runs.folder / f"needs/{name}_64.pth").exists() for name in ("pretrain", "full_dist")
    )
    assert runs.output.count("distill needs pretrain_64 first") == 1


def test_an_error_of_all_is_said_once(runs):
    assert runs.output.count("There is no data file nowhere.jsonl") == 1
    assert runs.output.count("code 2") == 2


def test_processes_without_a_shared_folder_do_not_go_on(runs):
    for rank in (0, 1):
        said = rf"different steps in apart_{rank}/checkpoints \(\[\d+, 0\].*folder that all machines share"
        assert re.search(said, runs.output)
    assert not (runs.folder / "apart_1/checkpoints").exists()


def test_a_killed_process_stops_the_others_with_a_message(runs):
    assert runs.code != 0 and runs.seconds_after_death < 20
    assert "Another process of this run has stopped" in runs.output
    assert "Signal 9 (SIGKILL)" in runs.output  # which one, says torchrun


def test_a_resume_point_of_another_global_batch_is_refused(runs):
    point = read_tensors(runs.folder / "two/checkpoints/full_sft_32_resume.pth")
    assert point["settings"]["accumulation_steps"] == 2  # of two processes, 1 each
    with pytest.raises(UserError, match=r"accumulation_steps was 2 and is 1.*all processes"):
        minimind.train("sft", **runs.settings("sft", "two", 1, from_resume=1))


def test_batches_are_shared_out_evenly_and_idle_ones_count_for_nothing(monkeypatch):
    batches = [{"number": torch.tensor(number)} for number in range(9)]
    for size in (1, 2, 3, 4):
        monkeypatch.setattr(distributed, "size", lambda size=size: size)
        parts = []
        for rank in range(size):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            parts.append(distributed.shared(batches, range(2, 7)))
        assert {len(part) for part in parts} == {-(-5 // size)}
        real = [int(batch["number"]) for part in parts for batch in part if "idle" not in batch]
        assert sorted(real) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "stage, settings, fault",
    [
        ("pretrain", {}, "one process"),
        ("lora", {}, "stage=lora"),
        ("pretrain", {"optimizer": "muon", "dtype": "float16"}, "optimizer=muon, dtype=float16"),
    ],
)
def test_fsdp_says_what_it_cannot_do(stage, settings, fault):
    settings = {"optimizer": "adamw", "dtype": "float32", **settings}
    with pytest.raises(UserError, match=f"fsdp=1 cannot be used with {fault}. It needs torchrun"):
        distributed.shard(None, stage, **settings)
