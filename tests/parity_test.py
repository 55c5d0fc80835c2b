"""The same model everywhere: ours, transformers, the re-imported folder, llama.cpp; and the server under load.

`python tests/parity_test.py` trains three small models, compares them on 50 held-out questions, and prints the
tables of docs/ways_in_and_out.md. Under pytest it is shorter.
"""

import argparse
import asyncio
import contextlib
import io
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import openai
import torch
import transformers

import minimind
from minimind import serve
from minimind.config import data_samples
from minimind.data import check_conversation, read_jsonl
from minimind.gguf import gguf_chat, open_gguf, write_gguf
from minimind.interop import import_hf, write_hf

KINDS = {
    "Llama": {"qk_norm": False},
    "Qwen3": {"qk_norm": True},
    "Qwen3-MoE": {"qk_norm": True, "use_moe": 1},
}
TOKENS = 48


@dataclass
class Parity:
    """Largest differences over all questions, and how many greedy answers are equal letter for letter."""

    parameters: int
    questions: int
    transformers_logits: float = 0.0
    reimport_logits: float = 0.0
    llama_cpp_logps: float = 0.0
    transformers_texts: int = 0
    llama_cpp_texts: int = 0


def trained(kind, preset, folder):
    """A model of this kind after pretraining and fine-tuning, and its tokenizer."""
    settings = {"preset": preset, "out_dir": str(Path(folder, kind)), **KINDS[kind]}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        minimind.train("pretrain", **settings)
        result = minimind.train("sft", **settings)
    return result.model.cpu().eval(), result.tokenizer


def heldout_questions(count):
    rows = read_jsonl(data_samples("sft_heldout.jsonl"), check_conversation)
    return [row["conversations"][:-1] for row in rows[:: len(rows) // count][:count]]


@torch.no_grad()
def compare(model, tokenizer, questions, folder):
    """Write the model as a folder and as a GGUF, read both, and compare on every question."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(write_hf(model, tokenizer, folder))
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    again, _ = import_hf(folder)
    llama = open_gguf(write_gguf(model, tokenizer, Path(folder, "model.gguf")))
    found = Parity(model.num_parameters, len(questions))
    for chat in questions:
        ids = auto.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        logits, said = model(ids["input_ids"])[0], minimind.chat(model, tokenizer, chat, TOKENS)
        found.transformers_logits = max(
            found.transformers_logits, distance(theirs(**ids).logits[0], logits)
        )
        found.reimport_logits = max(
            found.reimport_logits, distance(again(ids["input_ids"])[0], logits)
        )
        first = first_logps(llama, ids["input_ids"][0].tolist(), tokenizer)
        found.llama_cpp_logps = max(
            found.llama_cpp_logps, distance(first, logits[-1].log_softmax(-1))
        )
        answer = theirs.generate(**ids, max_new_tokens=TOKENS, do_sample=False)[
            0, ids["input_ids"].shape[1] :
        ]
        found.transformers_texts += auto.decode(answer, skip_special_tokens=True) == said
        found.llama_cpp_texts += gguf_chat(llama, chat, TOKENS) == said
    return found


def distance(one, other):
    return (one - other).abs().max().item()


def first_logps(llama, prompt, tokenizer):
    """ln p (V,) of llama.cpp for the token after a prompt. It gives figures with whole characters only: say "a"."""
    ask = {"prompt": prompt, "n_predict": 1, "n_probs": tokenizer.vocab_size, "temperature": 0}
    answer = llama.handle_completions({**ask, "logit_bias": [[tokenizer.encode("a")[0], 1000.0]]})
    logps = torch.full((tokenizer.vocab_size,), torch.nan)
    for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        logps[token["id"]] = token["logprob"]
    return logps


@contextlib.contextmanager
def served(model, tokenizer, name="model"):
    """The URL of a server in a thread of its own."""
    server, listener = serve.make_server(serve.make_app(model, tokenizer, name), 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield "http://{}:{}/v1".format(*listener.getsockname())
    finally:
        server.should_exit = True
        thread.join()


async def one_stream(client, chat, **more):
    """The times at which the parts of an answer came, and its count of tokens."""
    times, usage = [], {"include_usage": True}
    answer = await client.chat.completions.create(
        model="model", messages=chat, stream=True, stream_options=usage, **{"max_tokens": 64, "temperature": 1, **more}
    )  # fmt: skip
    async for chunk in answer:
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.perf_counter())
        tokens = chunk.usage.completion_tokens if chunk.usage else 0
    return times, tokens


def load(url, questions):
    """Ask all at once. Tokens per second in all, and the seconds until the last one has its first word."""

    async def everyone():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(
                *(one_stream(client, chat, seed=i) for i, chat in enumerate(questions))
            )

    start = time.perf_counter()
    answers = asyncio.run(everyone())
    tokens, seconds = sum(tokens for _, tokens in answers), time.perf_counter() - start
    return tokens / seconds, max(times[0] for times, _ in answers) - start


def parity_table(preset, count):
    print(f"{count} held-out questions, float32, {TOKENS} greedy tokens, preset {preset}\n")
    print(
        "| | parameters | logits, transformers | logits, re-imported | first-step ln p, llama.cpp | greedy texts equal, transformers | llama.cpp |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            model, tokenizer = trained(kind, preset, folder)
            f = compare(model, tokenizer, heldout_questions(count), Path(folder, kind, "hf"))
            print(f"| {kind} | {f.parameters:,} | {f.transformers_logits:.1g} | {f.reimport_logits:.1g} | "
                  f"{f.llama_cpp_logps:.1g} | {f.transformers_texts} / {count} | {f.llama_cpp_texts} / {count} |", flush=True)  # fmt: skip


def load_table(streams):
    tokenizer = minimind.Tokenizer.load(data_samples("tokenizer.json"))
    shapes = {"course": (tokenizer.vocab_size, 128, 4, 4), "26M": (6400, 512, 8, 8)}
    print(
        f"\n{torch.get_num_threads()} CPU thread(s), untrained weights, answers of at most 64 tokens\n"
    )
    print(
        "| | parameters | streams | tokens/s in all | last one's first word after |\n|---|--:|--:|--:|--:|"
    )
    for name, shape in shapes.items():
        torch.manual_seed(0)
        model = minimind.MiniMind(minimind.ModelConfig(*shape))
        with served(model, tokenizer) as url:
            for count in (1, streams):
                speed, first = load(url, heldout_questions(count))
                print(
                    f"| {name} | {model.num_parameters:,} | {count} | {speed:.0f} | {first:.2f} s |",
                    flush=True,
                )


def test_three_ways_to_run_a_trained_model(tmp_path):
    for kind in KINDS:
        model, tokenizer = trained(kind, "tiny", tmp_path)
        found = compare(model, tokenizer, heldout_questions(4), tmp_path / kind / "hf")
        assert max(found.transformers_logits, found.reimport_logits) < 1e-5, found
        assert found.llama_cpp_logps < 1e-3, found
        assert found.transformers_texts == found.llama_cpp_texts == 4, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--streams", type=int, default=32)
    given = parser.parse_args()
    parity_table(given.preset, given.questions)
    load_table(given.streams)
