"""`minimind <command>`, also `python -m minimind <command>`.

The flags of a stage are the fields of its config; tyro makes them from the dataclass. An error of
the user's is one paragraph on stderr and exit code 2, never a traceback.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

from minimind import distributed
from minimind.bench import bench, bench_generate, bench_text, machine_text, sampling_text
from minimind.checkpoint import find_weight, load_sidecar
from minimind.config import CONFIGS, PRESETS, PretrainConfig, TrainConfig, preset_settings
from minimind.corpus import open_tokens, own_tokenizer, prepare
from minimind.course import course, report_text
from minimind.download import download
from minimind.errors import UserError, bad_value, needed
from minimind.evaluate import samples
from minimind.generate import chat
from minimind.gguf import gguf_chat, open_gguf, write_gguf
from minimind.guard import Interrupted
from minimind.interop import is_upstream, load, locate, stretch, trained_length, write_hf
from minimind.measures import MEASURES
from minimind.model import MiniMind
from minimind.scoring import (
    bits_per_byte_of,
    choice_logps,
    mean_nats,
    perplexity_of,
    read_questions,
    read_text,
    score_choices,
    text_nats,
)
from minimind.tokenizer import Tokenizer
from minimind.trainer import train_config

Preset = Literal["tiny", "course", "full"]


@dataclass
class Course:
    """Train every stage on the built-in data, measure each, print the report card and a chat."""

    preset: Preset = "course"
    seed: int = 42
    out_dir: str = ""
    """Another folder for weights and report."""


@dataclass
class Download:
    """Fetch files of the guide's data set; a broken download goes on where it stopped."""

    names: tyro.conf.Positional[tuple[str, ...]]
    """pretrain_hq sft_mini_512 dpo r1_mix_1024 rlaif-mini, or any other file there."""
    to: str = "dataset"
    """The folder they go to."""
    source: Literal["huggingface", "modelscope"] = "huggingface"
    """The environment variable HF_ENDPOINT names a mirror of the first."""


@dataclass
class Prepare:
    """Write the texts of a JSON-lines file as tokens, which training maps into memory."""

    data_path: str = PretrainConfig.data_path
    tokenizer_path: str = ""
    """If empty, one of 6,400 tokens is trained on the texts and kept beside them, for pretraining too."""
    to: str = ""
    """Where to; if empty, beside the source, ending in .tokens."""
    skip_bad_rows: int = 0
    """1 leaves out rows that cannot be used, names and counts them."""


@dataclass
class Weight:
    """Which weight, and how it is read."""

    weight: str = "full_sft"
    """A name, the path of a .pth (upstream MiniMind's too), a Hugging Face folder, or a .gguf (chat)."""
    preset: Preset = "course"
    """Whose folder to look in."""
    out_dir: str = ""
    """Another folder to look in."""
    tokenizer_path: str = ""
    """The tokenizer of an upstream weight, if it is not beside it."""
    yarn_factor: float = 0.0
    """Stretch the positions by YaRN for texts so many times as long as trained on."""
    yarn_from: int = 0
    """The length in tokens it was trained on, if the weight does not say."""


@dataclass
class Chat(Weight):
    """Talk with a weight. An empty line ends the talk."""

    message: str = ""
    """Answer this one message and stop."""
    temperature: float = 0.0
    """0: always the most likely token; 1: the model's own distribution."""
    top_p: float = 1.0
    max_new_tokens: int = 128


@dataclass
class Eval(Weight):
    """Print the held-out measures of a weight and sample answers, or its scores on a file of yours."""

    stage: str = ""
    """Whose held-out measures; if empty, those of the weight's last stage."""
    text_path: str = ""
    """Any text file: its perplexity and bits per byte."""
    length: int = 0
    """Tokens of context for text_path; if 0, what the weight was trained on, or 512."""
    choices_path: str = ""
    """Multiple choice, JSON lines with "question", "choices" and "answer"."""
    as_chat: bool = False
    """Ask choices_path in the chat template, not as plain text."""


@dataclass
class Export(Weight):
    """Write a weight as a folder for transformers and vLLM, or as a GGUF for llama.cpp and Ollama."""

    gguf: bool = False
    """One .gguf file instead of a folder."""
    to: str = ""
    """Where to; if empty, beside the weight."""


@dataclass
class Serve(Weight):
    """Serve a weight to OpenAI's clients, on this machine only."""

    port: int = 8000


@dataclass
class Bench(PretrainConfig):
    """Measure training side by side: ours, transformers', number formats, compiled; memory, chats, times."""

    batch_size: int = field(default_factory=lambda: 32 if torch.cuda.is_available() else 2)
    """Rows of a step: 32 on a GPU, 2 on a CPU."""
    max_seq_len: int = 512
    compile: int = 1
    """0: not compiled, which saves a minute."""
    gradient_checkpointing: int = 1
    """0: not with gradient checkpointing."""
    vocab_size: int = 6400
    repeats: int = 5
    """Steps of each side; the median counts."""
    generate: bool = False
    """Time sampling instead, beside transformers' generate on the same weights."""
    json: str = ""
    """A file to write the figures to as well."""


def folder_of(preset: str, out_dir: str) -> str:
    """Return where a preset's weights are, unless another folder was given."""
    return out_dir or preset_settings("pretrain", preset).get("out_dir", "out")


def run_course(args: Course) -> None:
    """Train, then print what `report.md` says."""
    report = course(args.preset, args.seed, args.out_dir or None)
    print(report_text(report))
    print(f"Written to {folder_of(args.preset, args.out_dir)}/report.md, .json and .png")


def run_download(args: Download) -> None:
    """Fetch one after the other."""
    for name in args.names:
        print(f"Ready: {download(name, args.to, args.source)}")


def run_prepare(args: Prepare) -> None:
    """Prepare; say what came of it and how to train on it."""
    given = args.tokenizer_path
    tokenizer = Tokenizer.load(given) if given else own_tokenizer(args.data_path)
    to = prepare(args.data_path, tokenizer, args.to, bool(args.skip_bad_rows))
    tokens, skipped = open_tokens(to, tokenizer)
    print(f"Ready: {to}, {len(tokens):,} tokens, {tokenizer.vocab_size:,} different")
    for fault, count in skipped.items():
        print(f"{count:8,} x {fault}")


def open_weight(args: Weight) -> tuple[MiniMind, Tokenizer]:
    """Load a weight, stretched by YaRN if that is asked for."""
    folder = folder_of(args.preset, args.out_dir)
    model, tokenizer = load(args.weight, folder, args.tokenizer_path)
    if args.yarn_factor:
        trained = args.yarn_from or trained_length(args.weight, folder)
        if not trained:
            raise UserError("The weight does not say how long its texts were. Give --yarn_from.")
        theirs = {"attention_factor": 1.0} if is_upstream(locate(args.weight, folder)) else {}
        model = stretch(model, args.yarn_factor, trained, **theirs)
    return model, tokenizer


def talker(args: Chat) -> Callable[[list[dict]], str]:
    """Return what answers a conversation: a model of ours, or llama.cpp."""
    names = ("max_new_tokens", "temperature", "top_p")
    sampling = {name: getattr(args, name) for name in names}
    if args.weight.endswith(".gguf"):
        if args.yarn_factor:
            raise UserError("A GGUF carries its own scaling: export it with --yarn_factor.")
        server = open_gguf(args.weight)
        return lambda messages: gguf_chat(server, messages, **sampling)
    model, tokenizer = open_weight(args)
    return lambda messages: chat(model, tokenizer, messages, **sampling)


def run_chat(args: Chat) -> None:
    """One answer, or a talk until an empty line; the talk so far is the prompt."""
    answer_to = talker(args)
    messages: list[dict] = []
    while text := args.message or _ask():
        messages.append({"role": "user", "content": text})
        answer = answer_to(messages)
        messages.append({"role": "assistant", "content": answer})
        print(answer if args.message else f"model> {answer}")
        if args.message:
            break


def _ask() -> str:
    try:
        return input("you> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def run_eval(args: Eval) -> None:
    """Score a file of the user's, or measure on held-out data."""
    model, tokenizer = open_weight(args)
    print(f"{args.weight}: {model.num_parameters:,} parameters")
    if args.text_path:
        score_text(args, model, tokenizer)
    if args.choices_path:
        score_questions(args, model, tokenizer)
    if not args.text_path and not args.choices_path:
        held_out(args, model, tokenizer)


def score_text(args: Eval, model: MiniMind, tokenizer: Tokenizer) -> None:
    """Print perplexity and bits per byte of a text, and the loss beyond the trained length."""
    text = read_text(args.text_path)
    trained = args.yarn_from or trained_length(args.weight, folder_of(args.preset, args.out_dir))
    length = args.length or int((trained or 512) * max(1, args.yarn_factor))
    nats, there = text_nats(model, tokenizer, text, length)
    bytes_, tokens = len(text.encode()), int(there.sum())
    print(f"\n{args.text_path}: {bytes_:,} bytes, {tokens:,} tokens in windows of {length}")
    print(f"perplexity per token   {perplexity_of(nats, there):9.3f}   (depends on the tokenizer)")
    print(f"bits per byte          {bits_per_byte_of(nats, text):9.3f}   (does not)")
    if 0 < trained < length and there[:, trained:].any():
        near, far = (
            mean_nats(nats[:, part], there[:, part])
            for part in (slice(trained), slice(trained, None))
        )
        where = f"in the first {trained} of a window, {far:.3f} beyond"
        print(f"loss per token         {near:9.3f}   {where}")


def score_questions(args: Eval, model: MiniMind, tokenizer: Tokenizer) -> None:
    """Print the share of right choices with its chance level and interval."""
    questions = read_questions(args.choices_path)
    logps = choice_logps(model, tokenizer, questions, args.as_chat)
    how = "as chat" if args.as_chat else "as plain text"
    print(f"\n{args.choices_path}: {len(questions)} questions {how}")
    for name in ("log-likelihood", "log-likelihood per byte"):
        score = score_choices(questions, logps, per_byte=name.endswith("byte"))
        low, high = score.interval
        verdict = f"95%: {low:.3f} to {high:.3f}, chance {score.chance:.3f}: {score.verdict}"
        print(f"{name:23}   {score.share:.3f}   ({verdict})")


def held_out(args: Eval, model: MiniMind, tokenizer: Tokenizer) -> None:
    """Print the measures of a stage, by default the last that the weight has been through."""
    stage = args.stage or last_stage(args.weight, folder_of(args.preset, args.out_dir))
    if stage not in MEASURES:
        raise bad_value("stage", stage, MEASURES)
    measures, found = MEASURES[stage](model, tokenizer)
    print(f"measures of the stage {stage}\n")
    for name, measure in measures.items():
        print(
            f"{name:28} {measure.value:6.3f}   ({measure.held_out_examples} held-out, {measure.better} is better)"
        )
    print()
    for sample in samples(found):
        print(
            f"{'✓' if sample['right'] else '✗'} {sample['question']}  →  {sample['answer'].strip()}"
        )


def last_stage(weight: str, folder: str) -> str:
    """Return the last stage in a weight's sidecar; "sft" for a weight from elsewhere."""
    try:
        return load_sidecar(find_weight(weight, folder))["stages"][-1]["stage"]
    except (UserError, LookupError):
        return "sft"


def run_export(args: Export) -> None:
    """Write beside the weight, under its own file name, unless told where to."""
    model, tokenizer = open_weight(args)
    place = locate(args.weight, folder_of(args.preset, args.out_dir)).resolve()
    write, end = (write_gguf, ".gguf") if args.gguf else (write_hf, "_hf")
    stretched = f"_yarn{args.yarn_factor:g}" if args.yarn_factor else ""
    name = place.name.removesuffix(".pth") + stretched + end
    print(f"Written: {write(model, tokenizer, args.to or place.with_name(name))}")


def run_serve(args: Serve) -> None:
    """Serve under the weight's name."""
    needed("fastapi", "serve")
    needed("uvicorn", "serve")
    from minimind.serve import serve

    serve(*open_weight(args), Path(args.weight).resolve().stem, args.port)


def run_bench(args: Bench) -> None:
    """Measure and print."""
    if args.generate:
        print(sampling_text(bench_generate(args, args.vocab_size)))
    else:
        print(machine_text(args) + "\n")
        found = bench(args, args.vocab_size, args.repeats)
        print(bench_text(found))
        if args.json:
            Path(args.json).write_text(json.dumps([asdict(figure) for figure in found], indent=1))


COMMANDS = {
    "course": (Course, run_course), "download": (Download, run_download),
    "prepare": (Prepare, run_prepare), "chat": (Chat, run_chat), "eval": (Eval, run_eval),
    "export": (Export, run_export), "serve": (Serve, run_serve),
}  # fmt: skip
USAGE = f"""usage: minimind <command> [flags]      (minimind <command> --help lists the flags)

train one stage    {" ".join(CONFIGS)}
                   --preset tiny | course | full (default) and the flags of the guide
everything         course
get data           download  prepare
use a weight       chat  eval  serve  export
measure speed      bench"""


def split_preset(arguments: list[str]) -> tuple[str, list[str]]:
    """Take `--preset NAME` (or `--preset=NAME`) out of the arguments; "full" if it is not there."""
    arguments = [part for argument in arguments for part in (
        argument.split("=", 1) if argument.startswith("--preset=") else [argument])]  # fmt: skip
    if "--preset" not in arguments:
        return "full", arguments
    place = arguments.index("--preset")
    name = arguments[place + 1] if place + 1 < len(arguments) else ""
    if name not in PRESETS:
        raise bad_value("preset", name, PRESETS)
    return name, arguments[:place] + arguments[place + 2 :]


def parse(kind: type, arguments: list[str], command: str, default: object = None) -> TrainConfig:
    """Parse flags into a dataclass; --batch_size and --batch-size are the same flag."""
    keywords = {} if default is None else {"default": default}
    return tyro.cli(
        kind, args=arguments, prog=f"minimind {command}", use_underscores=True, **keywords
    )


def dispatch(arguments: list[str]) -> None:
    """Run one command. UserError for whatever the user can mend."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    command, flags = arguments[0], arguments[1:]
    if command not in CONFIGS and distributed.size() > 1:
        raise UserError(f"{command} runs as one process, without torchrun.")
    if command in COMMANDS:
        kind, run = COMMANDS[command]
        run(parse(kind, flags, command))
    elif command == "bench":
        preset, flags = split_preset(flags)
        run_bench(parse(Bench, flags, command, Bench(**preset_settings("pretrain", preset))))
    elif command in CONFIGS:
        preset, flags = split_preset(flags)
        default = CONFIGS[command](**preset_settings(command, preset))
        try:
            result = train_config(command, parse(CONFIGS[command], flags, command, default))
        except Interrupted as stop:
            given = re.sub(r" --from[-_]resume[ =]\S+", "", shlex.join(["minimind", *arguments]))
            given = "the same torchrun command and" if distributed.size() > 1 else given
            stop.go_on = f"{given} --from_resume 1"
            raise
        distributed.say(
            f"Saved {result.weight_path}: "
            + ", ".join(f"{k} {v:g}" for k, v in result.metrics.items())
        )
    else:
        raise bad_value("command", command, [*COMMANDS, "bench", *CONFIGS])


def main() -> None:
    """Entry point: exit code 0; 2 with one paragraph on stderr; 130 or 143 after a signal."""
    try:
        distributed.start()
        dispatch(sys.argv[1:])
        distributed.end_well()
    except UserError as error:
        complain(error)
        sys.exit(2)
    except Interrupted as stop:
        complain(stop)
        sys.exit(128 + stop.signal)
    except KeyboardInterrupt:
        complain("stopped. Go on from the last resume point with --from_resume 1.")
        sys.exit(130)


def complain(message: object) -> None:
    """Print a message on stderr, unless another process of the run has done so."""
    if distributed.may_complain():
        print(f"minimind: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
