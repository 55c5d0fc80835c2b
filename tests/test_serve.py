"""The endpoint as OpenAI's own client meets it: answers, streams, and every refusal."""

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from functools import partial

import openai
import pytest
import torch

import minimind
from minimind import UserError, serve
from minimind.generate import stream

HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(1)
    config = minimind.ModelConfig(tokenizer.vocab_size, 64, 2, 4, max_position_embeddings=300)
    model = minimind.MiniMind(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1) if parameter.ndim > 1 else parameter.data.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def url(model, tokenizer):
    server, listener = serve.make_server(serve.make_app(model, tokenizer, "tiny"), 0)
    host, port = listener.getsockname()
    assert host == "127.0.0.1"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://{host}:{port}/v1"
    server.should_exit = True
    thread.join()


@pytest.fixture
def ask(url):
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    return lambda **more: client.chat.completions.create(
        **{"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0, **more}
    )


def test_a_stream_of_tokens_is_what_generate_returns(model, tokenizer):
    prompt = tokenizer.encode_chat(HELLO, add_generation_prompt=True)
    for sampling in ({"temperature": 0}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}):
        whole = minimind.generate(model, [prompt], 20, eos_id=7, **sampling)[0]
        assert list(stream(model, prompt, 20, eos_id=7, **sampling)) == whole


def test_the_answer_is_that_of_chat(model, tokenizer, url, ask):
    assert [card.id for card in openai.OpenAI(base_url=url, api_key="none").models.list()] == [
        "tiny"
    ]
    answer = ask()
    assert answer.choices[0].message.content == minimind.chat(model, tokenizer, HELLO, 12)
    prompt = tokenizer.encode_chat(HELLO, add_generation_prompt=True)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)
    assert answer.choices[0].finish_reason == "length"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]
    assert ask(messages=parts).choices[0].message.content == answer.choices[0].message.content
    one, other, third = (ask(temperature=1, seed=s).choices[0].message.content for s in (3, 3, 4))
    assert one == other != third


def test_a_stream_says_the_same_and_ends_in_done(ask, url):
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == ask().choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12
    body = json.dumps({"model": "tiny", "messages": HELLO, "stream": True, "max_tokens": 2})
    raw = send(url, body.encode())
    assert raw.endswith(b"data: [DONE]\n\n") and raw.count(b"\n\n") >= 3


def test_half_a_character_waits_for_its_rest(tokenizer, model):
    engine = serve.Engine(model, tokenizer, "tiny")
    ids = [*tokenizer.encode("é🙂 你"), tokenizer.eos_id]
    serve_ids = iter(ids)
    engine_stream, serve.stream = serve.stream, lambda *_, **__: serve_ids
    try:
        found = asyncio.run(collect(engine))
    finally:
        serve.stream = engine_stream
    assert "".join(found) == "é🙂 你" and not any("\ufffd" in piece for piece in found)


async def collect(engine):
    ask = serve.Ask(model="tiny", messages=HELLO)
    return [piece async for piece, _ in engine.answer(ask, [1], 9)]


def test_32_streams_at_once(model, tokenizer, url):
    chats = [[{"role": "user", "content": f"What is {i}+8?"}] for i in range(32)]

    async def one(client, messages):
        answer = await client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=10, temperature=0, stream=True
        )
        parts = [(time.perf_counter(), c.choices[0].delta.content) async for c in answer]
        return [(moment, words) for moment, words in parts if words]

    async def everyone():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, messages) for messages in chats))

    found = asyncio.run(everyone())
    texts = ["".join(words for _, words in parts) for parts in found]
    assert texts == [minimind.chat(model, tokenizer, m, 10) for m in chats]
    assert max(parts[0][0] for parts in found) < min(
        parts[-1][0] for parts in found
    )  # side by side


def test_a_full_house_refuses_and_opens_again(tokenizer, url, monkeypatch):
    go_on = threading.Event()

    def waiting(*_, **__):
        go_on.wait(20)
        yield tokenizer.eos_id

    async def everyone():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            ask = partial(
                client.chat.completions.create, model="tiny", messages=HELLO, max_tokens=1
            )
            asked = [ask(stream=True) for _ in range(serve.MAX_OPEN + 8)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            refused = [a for a in answers if isinstance(a, openai.RateLimitError)]
            assert len(refused) == 8 and refused[0].body["code"] == "rate_limit_exceeded"
            go_on.set()
            streams = [a for a in answers if not isinstance(a, Exception)]
            for stream_ in streams:
                assert [chunk async for chunk in stream_][-1].choices[0].finish_reason == "stop"
            assert (await ask()).choices[0].finish_reason == "stop"

    monkeypatch.setattr(serve, "stream", waiting)
    asyncio.run(everyone())


def test_an_answer_that_breaks_is_an_error_of_the_server(ask, monkeypatch):
    def breaking(*_, **__):
        yield 300
        raise RuntimeError("a secret of this machine")

    monkeypatch.setattr(serve, "stream", breaking)
    with pytest.raises(openai.InternalServerError) as failure:
        ask()
    assert failure.value.body["type"] == "server_error"
    with pytest.raises(openai.APIError) as failure:
        list(ask(stream=True))
    assert failure.value.body["type"] == "server_error" and "secret" not in str(failure.value)


def test_an_answer_that_nobody_waits_for_stops(url, monkeypatch):
    made = []

    def slow(*_, **__):
        while len(made) < 100:
            time.sleep(0.02)
            made.append(300)
            yield 300

    monkeypatch.setattr(serve, "stream", slow)
    with pytest.raises(TimeoutError):
        send(url, json.dumps({"model": "tiny", "messages": HELLO}).encode(), timeout=0.3)
    time.sleep(0.3)
    stopped = len(made)
    time.sleep(0.2)
    assert 0 < len(made) == stopped < 50


def send(url, body, timeout=20, **headers):
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(f"{url}/chat/completions", body, headers)
    return urllib.request.urlopen(request, timeout=timeout).read()


REFUSED = {
    "unknown model": ({"model": "gpt-9"}, openai.NotFoundError, "model_not_found"),
    "too long": ({"messages": [{"role": "user", "content": "12345" * 70}]}, openai.BadRequestError, "context_length_exceeded"),
    "no room for the answer": ({"max_tokens": 299}, openai.BadRequestError, "context_length_exceeded"),
    "too many tokens": ({"max_tokens": 10**6}, openai.BadRequestError, "invalid_value"),
    "no messages": ({"messages": []}, openai.BadRequestError, "invalid_value"),
    "unknown role": ({"messages": [{"role": "robot", "content": "a"}]}, openai.BadRequestError, "invalid_value"),
    "temperature": ({"temperature": -1}, openai.BadRequestError, "invalid_value"),
    "several answers": ({"n": 2}, openai.BadRequestError, "unsupported_parameter"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "unsupported_parameter"),
    "a filter": ({"extra_body": {"top_k": 5}}, openai.BadRequestError, "unsupported_parameter"),
    "a smaller filter": ({"extra_body": {"min_p": 0.1}}, openai.BadRequestError, "unsupported_parameter"),
    "a choice": ({"extra_body": {"best_of": 3}}, openai.BadRequestError, "unsupported_parameter"),
    "a tool that must be called": ({"tool_choice": "required"}, openai.BadRequestError, "unsupported_parameter"),
    "a misspelt name": ({"extra_body": {"temprature": 0.1}}, openai.BadRequestError, "unsupported_parameter"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, openai.BadRequestError, "invalid_value"),
    "a long body": ({"messages": [{"role": "user", "content": "a" * (1 << 20)}]}, openai.APIStatusError, "body_too_large"),
}  # fmt: skip


@pytest.mark.parametrize("change, kind, code", REFUSED.values(), ids=REFUSED)
def test_refusals_are_openais(change, kind, code, ask):
    with pytest.raises(kind) as refusal:
        ask(**change)
    assert refusal.value.code == code and refusal.value.body["message"]
    assert refusal.value.status_code == {"body_too_large": 413, "model_not_found": 404}.get(
        code, 400
    )


@pytest.mark.parametrize(
    "body, headers, status, code",
    [(b"{nonsense", {}, 400, "invalid_json"), (b"[1]", {}, 400, "invalid_value"), (b"", {}, 400, "invalid_value"),
     (b"\xff\xfe", {}, 400, "invalid_json"), (b"[" * 100_000, {}, 400, "invalid_request"),
     (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', {}, 400, "invalid_value"),
     (b'{"model": "tiny", "messages": [], "temperature": NaN}', {}, 400, "invalid_value"), (b"{}", {"Host": "evil.example"}, 403, "forbidden_host"),
     (b"{}", {"Origin": "http://evil.example"}, 403, "forbidden_host"), (b"{}", {"Origin": "null"}, 403, "forbidden_host")],
)  # fmt: skip
def test_bodies_that_are_no_request(body, headers, status, code, url):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        send(url, body, **headers)
    assert refusal.value.code == status
    assert json.loads(refusal.value.read())["error"]["code"] == code


def test_what_changes_nothing_is_taken(ask, url):
    plain = ask().choices[0].message.content
    more = {
        "top_k": 0,
        "min_p": 0,
        "best_of": 1,
        "tool_choice": "none",
        "user": "me",
        "metadata": {},
        "stop": None,
    }
    assert ask(n=1, extra_body=more).choices[0].message.content == plain
    body = {"model": "tiny", "messages": HELLO, "temperature": None, "top_p": None, "max_tokens": 2}
    assert send(url, json.dumps(body).encode(), Origin="http://localhost:8888")


def test_unknown_paths(url):
    with pytest.raises(openai.NotFoundError) as refusal:
        openai.OpenAI(base_url=url, api_key="none", max_retries=0).embeddings.create(
            model="tiny", input="a"
        )
    assert refusal.value.code == "unknown_url"


def test_a_taken_port_is_said(url):
    with pytest.raises(UserError, match="cannot be used"):
        serve.make_server(None, int(url.split(":")[2].split("/")[0]))
