"""`minimind <command>`, also `python -m minimind <command>`.

The flags of a stage are the fields of its config; tyro makes them from the dataclass. An error of
the user's is one paragraph on stderr and exit code 2, never a traceback.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

import tyro

from minimind.bench import bench, bench_text
from minimind.checkpoint import find_weight, load, load_sidecar
from minimind.config import CONFIGS, PRESETS, PretrainConfig, TrainConfig, preset_settings
from minimind.course import course, report_text
from minimind.errors import UserError, bad_value
from minimind.evaluate import MEASURES, samples
from minimind.generate import chat
from minimind.trainer import train_config

Preset = Literal["tiny", "course", "full"]


@dataclass
class Course:
    """Train every stage on the built-in data, measure each, print the report card and a chat."""

    preset: Preset = "course"
    seed: int = 42


@dataclass
class Chat:
    """Talk with a weight. An empty line ends the talk."""

    weight: str = "full_sft"
    """A weight's name, or the path of its .pth file."""
    preset: Preset = "course"
    """Whose folder to look in."""
    out_dir: str = ""
    """Another folder to look in."""
    message: str = ""
    """Answer this one message and stop."""
    temperature: float = 0.0
    """0: always the most likely token; 1: the model's own distribution."""
    top_p: float = 1.0
    max_new_tokens: int = 128


@dataclass
class Eval:
    """Print the held-out measures of a weight and sample answers."""

    weight: str = "full_sft"
    preset: Preset = "course"
    out_dir: str = ""


@dataclass
class Bench(PretrainConfig):
    """Time training steps of a configuration: tokens/s, utilisation, memory."""

    vocab_size: int = 6400


def folder_of(preset: str, out_dir: str) -> str:
    """Return where a preset's weights are, unless another folder was given."""
    return out_dir or preset_settings("pretrain", preset).get("out_dir", "out")


def run_course(args: Course) -> None:
    """Train, then print what `report.md` says."""
    report = course(args.preset, args.seed)
    print(report_text(report))
    print(f"Written to {folder_of(args.preset, '')}/report.md, .json and .png")


def run_chat(args: Chat) -> None:
    """One answer, or a talk until an empty line; the talk so far is the prompt."""
    model, tokenizer = load(args.weight, folder_of(args.preset, args.out_dir))
    sampling = dict(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p
    )
    messages: list[dict] = []
    while text := args.message or _ask():
        messages.append({"role": "user", "content": text})
        answer = chat(model, tokenizer, messages, **sampling)
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
    """Measure with the measures of the last stage that the weight has been through."""
    path = find_weight(args.weight, folder_of(args.preset, args.out_dir))
    model, tokenizer = load(str(path))
    stage = load_sidecar(path)["stages"][-1]["stage"]
    measures, found = MEASURES[stage](model, tokenizer)
    print(f"{path}: {model.num_parameters:,} parameters, last stage {stage}\n")
    for name, measure in measures.items():
        print(
            f"{name:28} {measure.value:6.3f}   ({measure.held_out_examples} held-out, {measure.better} is better)"
        )
    print()
    for sample in samples(found):
        print(
            f"{'✓' if sample['right'] else '✗'} {sample['question']}  →  {sample['answer'].strip()}"
        )


def run_bench(args: Bench) -> None:
    """Measure and print."""
    print(bench_text(args, bench(args, args.vocab_size)))


COMMANDS = {"course": (Course, run_course), "chat": (Chat, run_chat), "eval": (Eval, run_eval)}
USAGE = f"""usage: minimind <command> [flags]      (minimind <command> --help lists the flags)

train one stage    {" ".join(CONFIGS)}
                   --preset tiny | course | full (default) and the flags of the guide
everything         course
use a weight       chat  eval
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
    if command in COMMANDS:
        kind, run = COMMANDS[command]
        run(parse(kind, flags, command))
    elif command == "bench":
        preset, flags = split_preset(flags)
        run_bench(parse(Bench, flags, command, Bench(**preset_settings("pretrain", preset))))
    elif command in CONFIGS:
        preset, flags = split_preset(flags)
        default = CONFIGS[command](**preset_settings(command, preset))
        result = train_config(command, parse(CONFIGS[command], flags, command, default))
        print(
            f"Saved {result.weight_path}: "
            + ", ".join(f"{k} {v:g}" for k, v in result.metrics.items())
        )
    else:
        raise bad_value("command", command, [*COMMANDS, "bench", *CONFIGS])


def main() -> None:
    """Entry point: exit code 0, or 2 with one paragraph on stderr."""
    try:
        dispatch(sys.argv[1:])
    except UserError as error:
        print(f"minimind: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "minimind: stopped. Go on from the last resume point with --from_resume 1.",
            file=sys.stderr,
        )
        sys.exit(130)


if __name__ == "__main__":
    main()
