"""The server, asked by OpenAI's own client over a socket; what it refuses, whom it lets wait, and how it ends."""

import errno
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from openai.types.chat import ChatCompletion
from tiny_runs import TOKENIZER, Run, refused

from minilora.chat import answer_text
from minilora.checkpoint.adapter import save_adapter
from minilora.checkpoint.load import load_model
from minilora.config import LoraConfig, base_folder
from minilora.decode_graph import Steps
from minilora.generation import NotFiniteError, generate
from minilora.lora import add_lora
from minilora.model import Mistral
from minilora.serve import line as line_module
from minilora.serve import server as server_module
from minilora.serve.line import Line, Stops
from minilora.serve.request import Ask, Offer, Refused, read_ask
from minilora.serve.server import MAX_BODY, Server, listen, make_app, names_of
from minilora.tokenizer import Tokenizer, load_tokenizer

QUESTION = 'How is "mistral" pronounced?'
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
LIMIT = 200


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def model() -> Mistral:
    return load_model("demo", dtype=torch.float32)


@pytest.fixture(scope="module")
def offer(tokenizer: Tokenizer) -> Offer:
    sampling = {"temperature": 0.0, "top_k": None, "top_p": 1.0, "seed": None}
    return Offer("demo", tokenizer, LIMIT, 16, None, sampling)


@contextmanager
def serving(model: Mistral, offer: Offer) -> Iterator[tuple[str, int]]:
    listening = listen("127.0.0.1", 0)
    server = Server(make_app(Line(model, offer.tokenizer), offer, names_of(listening, "127.0.0.2")))
    thread = Thread(target=server.run, args=[[listening]])
    thread.start()
    yield listening.getsockname()
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def address(model: Mistral, offer: Offer) -> Iterator[tuple[str, int]]:
    """Where the server listens, as long as the module's tests run."""
    with serving(model, offer) as made:
        yield made


@pytest.fixture(scope="module")
def client(address: tuple[str, int]) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url_of(address)}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture
def ask(client: OpenAI) -> Callable[..., ChatCompletion]:
    def call(content: str = QUESTION, **more: Any) -> Any:
        messages: Any = [{"role": "user", "content": content}]
        return client.chat.completions.create(**{"model": "demo", "messages": messages, "max_tokens": 12, **more})

    return call


def url_of(address: tuple[str, int]) -> str:
    return f"http://{address[0]}:{address[1]}"


def text_of(answer: ChatCompletion) -> str:
    assert answer.choices[0].message.content is not None
    return answer.choices[0].message.content


def post(address: tuple[str, int], body: bytes, kind: str = "application/json") -> tuple[int, dict[str, Any]]:
    """Status and what came: always JSON."""
    url = f"{url_of(address)}/v1/chat/completions"
    request = urllib.request.Request(url, body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def connect(address: tuple[str, int], **fields: Any) -> socket.socket:
    """A client that has asked, and reads when it is told to."""
    body = json.dumps({"messages": MESSAGES, **fields}).encode()
    head = "POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"
    made = socket.create_connection(address, timeout=60)
    made.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
    return made


def until(happened: Callable[[], bool]) -> None:
    ends = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < ends, "the moment never came"
        time.sleep(0.005)


# --- Answers --------------------------------------------------------------------------------------------------------


def test_the_model_is_listed(client: OpenAI) -> None:
    [listed] = client.models.list().data
    assert (listed.id, listed.object, listed.owned_by) == ("demo", "model", "minilora")
    assert client.models.retrieve("demo") == listed
    for other in ("gpt-4", "demo/x", "../demo"):
        with pytest.raises(openai.NotFoundError, match=rf"there is no model '{other}', but demo") as unknown:
            client.models.retrieve(other)
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("name", ["mistralai/Mistral-7B", "你好", "a b"])
def test_any_name_is_found(name: str, offer: Offer, model: Mistral) -> None:
    with serving(model, replace(offer, name=name)) as there, OpenAI(base_url=f"{url_of(there)}/v1", api_key="x") as one:
        assert one.models.retrieve(name).id == name


def test_answers_are_those_of_generate(client: OpenAI, ask: Callable[..., ChatCompletion], run: Run) -> None:
    for n in (3, 12):  # it ends by itself between the two
        status, out, _ = run("generate", QUESTION, "--max_new_tokens", n, "--model.dtype", "float32")
        assert status == 0
        assert text_of(ask(max_tokens=n)) + "\n" == out
        with client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=n, stream=True) as events:
            assert "".join(event.choices[0].delta.content or "" for event in events) + "\n" == out


def test_tokens_are_counted_and_the_end_is_told(
    ask: Callable[..., ChatCompletion], model: Mistral, tokenizer: Tokenizer
) -> None:
    prompt, _ = tokenizer.encode_chat(MESSAGES)
    whole = generate(model, torch.tensor([prompt]), 12, eos_id=tokenizer.eos_id)[0, len(prompt) :].tolist()
    assert whole[-1] == tokenizer.eos_id
    for n, why in ((1, "length"), (len(whole) - 1, "length"), (len(whole), "stop"), (len(whole) + 1, "stop")):
        for name in ("max_tokens", "max_completion_tokens"):
            answer = ask(**{"max_tokens": None, name: n})
            assert answer.choices[0].finish_reason == why
            assert answer.usage is not None
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), min(n, len(whole)))
            assert answer.usage.total_tokens == len(prompt) + min(n, len(whole))
            assert (answer.model, answer.object, answer.choices[0].message.role) == (
                "demo",
                "chat.completion",
                "assistant",
            )
            assert abs(answer.created - time.time()) < 60
    assert ask(max_tokens=None).choices[0].finish_reason == "stop"
    assert len({ask(max_tokens=1).id for _ in range(2)}) == 2


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_is_as_the_api_has_it(client: OpenAI, ask: Callable[..., ChatCompletion], usage: bool) -> None:
    options: Any = {"include_usage": usage}
    with client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=3, stream=True, stream_options=options
    ) as stream:
        events = list(stream)
    if usage:
        *events, last = events
        assert last.choices == []
        assert last.usage == ask(max_tokens=3).usage
        assert all(event.usage is None for event in events)
    assert {(event.id, event.model, event.object) for event in events} == {
        (events[0].id, "demo", "chat.completion.chunk")
    }
    assert events[0].choices[0].delta.role == "assistant"
    assert [event.choices[0].finish_reason for event in events] == [None] * (len(events) - 1) + ["length"]


def test_draws_are_those_of_their_seed(
    ask: Callable[..., ChatCompletion], model: Mistral, tokenizer: Tokenizer
) -> None:
    prompt, _ = tokenizer.encode_chat(MESSAGES)
    hot: dict[str, Any] = {"temperature": 2, "top_p": 0.9}
    drawn = {seed: text_of(ask(seed=seed, **hot)) for seed in (1, 2, -(2**63), 2**63 - 1)}
    assert drawn[1] == text_of(ask(seed=1, **hot)) != drawn[2]
    for seed, text in drawn.items():
        assert text == "".join(answer_text(model, tokenizer, prompt, 12, seed=seed, **hot))
    assert text_of(ask(temperature=2, top_p=0)) == text_of(ask(temperature=2, top_p=1e-320)) == text_of(ask())


def test_who_says_how_to_draw_wants_draws(offer: Offer) -> None:
    """Of an own temperature of 0 nothing is drawn, so a seed alone would do nothing: the API's default is 1."""

    def temperature(offer: Offer = offer, **fields: Any) -> float:
        return float(read_ask(json.dumps({"messages": MESSAGES, **fields}).encode(), offer).sampling["temperature"])

    assert temperature() == temperature(top_p=1) == temperature(seed=None) == temperature(seed=3, temperature=0) == 0
    assert temperature(seed=3) == temperature(top_p=0.5) == 1
    warm = replace(offer, sampling={**offer.sampling, "temperature": 0.7})
    assert temperature(warm) == temperature(warm, seed=3) == temperature(warm, top_p=0.5) == 0.7


def test_what_changes_nothing_is_passed_over(ask: Callable[..., ChatCompletion]) -> None:
    said = text_of(ask())
    nothing: dict[str, Any] = {
        **{"n": 1, "tools": [], "tool_choice": "auto", "logprobs": False, "logit_bias": {}, "presence_penalty": 0},
        **{"frequency_penalty": 0.0, "response_format": {"type": "text"}, "modalities": ["text"], "audio": None},
        **{"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "seed": None, "stop": None},
        **{"stream": False, "temperature": None, "top_p": None, "parallel_tool_calls": True},
        **{"stream_options": {"include_obfuscation": True, "include_usage": None}},
    }
    assert text_of(ask(**nothing)) == said
    parts = [{"type": "text", "text": QUESTION}]
    assert text_of(ask(messages=[{"role": "user", "content": parts, "name": "me"}])) == said


def test_a_request_needs_no_model(address: tuple[str, int]) -> None:
    status, answer = post(address, json.dumps({"messages": MESSAGES}).encode(), "Application/JSON; charset=utf-8")
    assert (status, answer["model"]) == (200, "demo")


def test_the_readme_s_examples_are_answered(address: tuple[str, int], client: OpenAI) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    [curl] = re.findall(r"^  -d '(.*)'$", readme, re.MULTILINE)
    [call] = re.findall(r"`(client\.chat\..*?)`", readme)
    assert eval(call, {"client": client}).choices[0].message.content
    assert post(address, curl.encode())[0] == 200


def test_the_conversation_and_the_system_text_are_what_the_model_sees(offer: Offer) -> None:
    def prompt(offer: Offer, *messages: dict[str, Any]) -> list[int]:
        return read_ask(json.dumps({"messages": messages}).encode(), offer).prompt

    encode = offer.tokenizer.encode_chat
    a, b = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    said, other = {"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be long."}
    assert prompt(offer, a, b, a) == encode([a, b, a])[0]
    assert prompt(offer, said, a) == prompt(offer, said | {"role": "developer"}, a) == encode([said, a])[0]
    with_system = replace(offer, system="Be brief.")
    assert prompt(with_system, a, b, a) == encode([said, a, b, a])[0]
    assert prompt(with_system, other, a) == encode([other, a])[0]
    for silent in (b | {"content": ""}, b | {"content": None}, {"role": "assistant", "tool_calls": []}):
        assert prompt(offer, a, silent, a) == encode([a, a])[0], "what we have answered may be sent back"
    with pytest.raises(Refused, match=r"^message 1: its role is 'x'"):
        prompt(with_system, {"role": "x", "content": "a"})


def test_an_answer_has_what_room_there_is(offer: Offer) -> None:
    def read(n_words: int, **more: Any) -> Ask:
        messages = [{"role": "user", "content": "a" * n_words}]
        return read_ask(json.dumps({"messages": messages, **more}).encode(), offer)

    assert read(1).max_new_tokens == offer.max_new_tokens
    assert read(1, max_tokens=50).max_new_tokens == 50
    beside = LIMIT - len(read(150).prompt) + 150  # a's that fill all, as each is a token
    assert read(beside - 1).max_new_tokens == 1
    assert len(read(beside - 50, max_tokens=50).prompt) == LIMIT - 50
    for n_words, more in ((beside, {}), (beside - 49, {"max_tokens": 50})):
        with pytest.raises(Refused, match=rf"there is room for {LIMIT}") as refused:
            read(n_words, **more)
        assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")


# --- Stops ----------------------------------------------------------------------------------------------------------


def test_nothing_of_a_stop_is_said_however_the_text_comes() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choices("ab", k=draw.randint(0, 12)))
        stops = tuple("".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3)))
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        expected, held, said = text[: min(ends)[1]] if ends else text, Stops(stops), ""
        rest = text
        while rest and not held.found:
            n = draw.randint(1, 3)
            said, rest = said + held.add(rest[:n]), rest[n:]
            assert expected.startswith(said)
        assert held.found == bool(ends)
        assert said + ("" if held.found else held.held) == expected, (text, stops)


def test_an_answer_ends_before_its_stop(ask: Callable[..., ChatCompletion], client: OpenAI) -> None:
    said = text_of(ask())
    assert len(said) >= 5
    for stop in (said[1:3], said[0], [said[3], said[1:4]], ["never", said[-2:]]):
        stops = [stop] if isinstance(stop, str) else stop
        expected = said[: min((said.find(s) + len(s), said.find(s)) for s in stops if s in said)[1]]
        answer = ask(stop=stop)
        assert (text_of(answer), answer.choices[0].finish_reason) == (expected, "stop")
        with client.chat.completions.create(
            model="demo", messages=MESSAGES, max_tokens=12, stop=stop, stream=True
        ) as events:
            assert "".join(event.choices[0].delta.content or "" for event in events) == expected
    never = ask(stop=[said[1:] + "x", "y"])
    assert text_of(never) == said, "what was held back came to nothing"
    cut = ask(stop=said[:4], max_tokens=3)
    assert (text_of(cut), cut.choices[0].finish_reason) == (said[:3], "length")


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "field", "words"),
    [
        ({"messages": []}, "messages", "messages is empty, but must be a list of messages"),
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": "hi"}, "messages", "messages is text"),
        ({"messages": ["hi"]}, "messages", "message 1"),
        ({"messages": [{}]}, "messages", "message 1: its role is None"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages", "message 1: its role is ['user']"),
        ({"messages": [{"role": "user"}]}, "messages", "message 1: its content is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", "a number"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "text parts"),
        *(
            ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]}, "messages", words)
            for part, words in (
                ({"type": "input_audio"}, "its content is a list whose part 2 is an object (type 'input_audio',"),
                ({}, "part 2 is an object (type None, text missing)"),
                ({"type": "text", "text": 3}, "part 2 is an object (type 'text', text a number)"),
                ("b", "part 2 is text, but must be text or a list of text parts"),
            )
        ),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "a"}]}, "messages", "let a user's follow"),
        ({"messages": [*MESSAGES, {"role": "tool", "content": "a"}]}, "messages", "role tool cannot follow user"),
        ({"messages": [{"role": "user", "content": "a" * 500}]}, "messages", "there is room for 200"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0, but must be a whole number from 1 to 200"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens is -1"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens is 1.5"),
        ({"max_tokens": True}, "max_tokens", "max_tokens is True"),
        ({"max_tokens": "5"}, "max_tokens", "max_tokens is '5'"),
        ({"max_tokens": 10**30}, "max_tokens", "max_tokens is 1000"),
        ({"max_tokens": LIMIT}, "messages", "the answer 200, but there is room for 200"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "is 0"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "two names"),
        ({"temperature": -0.1}, "temperature", "temperature is -0.1, but must be a number from 0 to 2"),
        ({"temperature": 2.5}, "temperature", "temperature is 2.5"),
        ({"temperature": float("nan")}, "temperature", "temperature is nan"),
        ({"temperature": float("inf")}, "temperature", "temperature is inf"),
        ({"temperature": "1"}, "temperature", "temperature is '1'"),
        ({"temperature": [1]}, "temperature", "temperature is [1]"),
        ({"top_p": 1.1}, "top_p", "top_p is 1.1"),
        ({"top_p": False}, "top_p", "top_p is False"),
        ({"seed": 2**63}, "seed", "seed is 9223372036854775808"),
        ({"seed": -(2**63) - 1}, "seed", "seed is -9223372036854775809"),
        ({"seed": 1.0}, "seed", "seed is 1.0"),
        ({"stop": ""}, "stop", "stop is ''"),
        ({"stop": 3}, "stop", "stop is 3"),
        ({"stop": ["a", ""]}, "stop", "stop is ['a', '']"),
        ({"stop": ["a", None]}, "stop", "stop is ['a', None]"),
        ({"stop": [*"abcde"]}, "stop", "up to 4 texts"),
        ({"stop": "a" * 1001}, "stop", "1 to 1,000 characters"),
        ({"stream": "yes"}, "stream", "stream is 'yes', but must be true or false"),
        ({"stream_options": True}, "stream_options", "must be an object"),
        ({"stream_options": {"include_usage": 1}}, "include_usage", "include_usage is 1"),
        ({"stream_options": {"usage": True}}, "stream_options", "stream_options: 'usage' is not supported"),
        ({"model": 3}, "model", "there is no model 3, but demo"),
        ({"n": 2}, "n", "n 2 is not supported; leave it out"),
        ({"n": 0}, "n", "n 0"),
        ({"n": True}, "n", "n True is not supported"),
        ({"logprobs": 0}, "logprobs", "not supported"),
        ({"top_logprobs": False}, "top_logprobs", "not supported"),
        ({"presence_penalty": False}, "presence_penalty", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"functions": []}, "functions", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"top_logprobs": 3}, "top_logprobs", "not supported"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"audio": {"voice": "x"}}, "audio", "not supported"),
        ({"max_token": 5}, "max_token", "max_token 5 is not supported"),
        ({"\ud800\x1b": 5}, "\\ud800\\x1b", "not supported"),
    ],
)
def test_a_wrong_field_is_named(address: tuple[str, int], changed: dict[str, Any], field: str, words: str) -> None:
    body = {"model": "demo", "messages": MESSAGES, "max_tokens": 4} | changed
    if "max_completion_tokens" in changed and "max_tokens" not in changed:
        del body["max_tokens"]
    status, answer = post(address, json.dumps(body).encode())
    assert status == (404 if field == "model" else 400)
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == field
    assert words in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "Expecting value"),
        (b"hello", "Expecting value"),
        (b"[]", "a JSON object was expected"),
        (b"null", "a JSON object was expected"),
        (b'{"messages": [', "Expecting value"),
        (b'{"messages": "\xff\xfe"}', "can't decode byte 0xff"),
        (b'{"seed": 1, "seed": 2}', "the key 'seed' stands twice"),
        (b'{"seed": 1' + b"0" * 5000 + b"}", "limit"),
        (b'{"stop": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        *((b'{"stop": ' + b"[" * n + b"]" * n + b"}", "") for n in range(400, 1000, 60)),
    ],
)
def test_what_is_no_request(address: tuple[str, int], body: bytes, words: str) -> None:
    status, answer = post(address, body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert words in answer["error"]["message"]


def test_a_body_has_a_limit_and_a_kind(address: tuple[str, int]) -> None:
    fits = json.dumps({"messages": [{"role": "user", "content": ""}]}).encode()
    text = b" " * (MAX_BODY - len(fits))
    assert post(address, fits + text)[0] == 200
    status, answer = post(address, fits + text + b" ")
    assert (status, "1,000,000 bytes" in answer["error"]["message"]) == (413, True)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""):
        status, answer = post(address, fits, kind)
        assert (status, answer["error"]["message"]) == (415, "the content-type must be application/json")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/page.html", 404),
        ("GET", "/..%2f..%2fetc/passwd", 404),
        ("GET", "/%ff%00%1b", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("DELETE", "/", 405),
    ],
)
def test_what_is_not_there(address: tuple[str, int], method: str, path: str, status: int) -> None:
    request = urllib.request.Request(url_of(address) + path, method=method)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    with refused.value as error:
        assert error.code == status
        assert json.load(error)["error"]["type"] == "invalid_request_error"
        assert not [name for name in error.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("path", ["/", "/v1/models", "/v1/chat/completions", "/nothing"])
def test_a_server_on_loopback_is_not_called_by_another_name(address: tuple[str, int], path: str) -> None:
    """As a page would whose own name leads here."""
    ours = ("localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000", "127.0.0.2")
    others = ("evil.example", "evil.example:8000", "localhost.evil.example", "x@localhost", "::1", "127.0.0.1:x", "")
    for host in (*ours, *others):
        with closing(http.client.HTTPConnection(*address, timeout=60)) as connection:
            connection.request("GET", path, headers={"Host": host})
            response = connection.getresponse()
            status, body = response.status, response.read()
        assert (status == 403) == (host in others), host
        if status == 403:
            error = json.loads(body)["error"]
            assert (set(error), error["type"]) == ({"message", "type", "param", "code"}, "invalid_request_error")
            assert error["message"].startswith(f"the host {host!r} is none of localhost, 127.0.0.1, [::1]")


def test_a_server_for_others_may_have_any_name() -> None:
    for host, names in {"0.0.0.0": 0, "127.0.0.1": 3, "localhost": 3, "LocalHost": 3, "127.0.0.3": 4}.items():
        with listen(host, 0) as listening:
            assert len(names_of(listening, host)) == names, host


def test_also_one_for_others_by_ipv6() -> None:
    try:
        socket.create_server(("::", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"there is no IPv6: {error}")
    with listen("::", 0) as listening:
        assert names_of(listening, "::") == ()


def test_openai_s_client_knows_what_is_wrong(ask: Callable[..., ChatCompletion]) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4', but demo") as unknown:
        ask(model="gpt-4")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature is 3") as wrong:
        ask(temperature=3)
    assert wrong.value.param == "temperature"
    assert text_of(ask()), "on the same connection"


# --- In line --------------------------------------------------------------------------------------------------------


class Told:
    """Answers to be had one piece at a time, and what became of each, by its prompt's tokens."""

    def __init__(self) -> None:
        self.go, self.begun, self.closed, self.running = Event(), list[int](), list[int](), 0

    def answer(self, _model: Any, _tokenizer: Any, prompt: list[int], *_: Any, **__: Any) -> Iterator[str]:
        self.running += 1
        assert self.running == 1, "one at a time"
        self.begun.append(len(prompt))
        try:
            while not self.go.wait(0.01):
                yield "x"
        finally:
            self.running -= 1
            self.closed.append(len(prompt))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    made = Told()
    monkeypatch.setattr(line_module, "answer_text", made.answer)
    yield made
    made.go.set()
    until(lambda: not made.running)


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_gives_up_the_turn(
    told: Told, address: tuple[str, int], tokenizer: Tokenizer, stream: bool
) -> None:
    lengths, asked = list[int](), list[dict[str, Any]]()
    for content in ("a", "aa", "aaa"):
        asked.append({"messages": [{"role": "user", "content": content}]})
        lengths.append(len(tokenizer.encode_chat(asked[-1]["messages"])[0]))
    first = connect(address, stream=stream, **asked[0])
    until(lambda: told.begun == lengths[:1])
    second = connect(address, stream=stream, **asked[1])
    with ThreadPoolExecutor() as pool:
        time.sleep(0.1)
        third = pool.submit(post, address, json.dumps(asked[2]).encode())
        time.sleep(0.1)
        second.close()  # which waits
        time.sleep(0.1)
        assert told.begun == lengths[:1]
        first.close()  # which is answered
        until(lambda: len(told.begun) > 1)
        told.go.set()
        assert third.result()[0] == 200
    assert told.begun == told.closed == [lengths[0], lengths[2]]


def test_who_goes_away_in_the_midst_of_asking_is_forgotten(
    address: tuple[str, int], ask: Callable[..., ChatCompletion], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(address) as half:
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        half.sendall(b'Content-Length: 100\r\n\r\n{"messages": ')
    assert text_of(ask())
    assert capsys.readouterr() == ("", "")


def test_that_no_file_descriptor_is_free_is_said_once(
    told: Told, model: Mistral, offer: Offer, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Who connects is let in when one is, and what asyncio still tries when the server ends is passed over."""
    refused = list[int]()

    def accept(_: socket.socket) -> None:
        refused.append(1)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    clients = ExitStack()
    with serving(model, offer) as there:
        clients.enter_context(connect(there))
        until(lambda: len(told.begun) == 1)
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "accept", accept)
            waiting = clients.enter_context(connect(there, model="gpt-4"))
            until(lambda: len(refused) > 1000)
        assert waiting.recv(12) == b"HTTP/1.1 404"
        monkeypatch.setattr(socket.socket, "accept", accept)
        clients.enter_context(connect(there))
        until(lambda: len(refused) > 5000)
    clients.close()
    assert capsys.readouterr() == ("", "no file descriptor is free: who connects waits; raise `ulimit -n`\n")
    assert caplog.records == []


def test_who_reads_slowly_keeps_nobody_in_line(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Far more is said than the sockets hold."""
    monkeypatch.setattr(line_module, "answer_text", lambda *_, **__: (piece for piece in ["x" * 2**20] * 16))
    with connect(address, stream=True):
        assert post(address, json.dumps({"messages": MESSAGES}).encode())[0] == 200


def test_the_server_answers_while_the_model_does(told: Told, address: tuple[str, int], client: OpenAI) -> None:
    with connect(address, stream=False):
        until(lambda: len(told.begun) == 1)
        assert client.models.list().data[0].id == "demo"
        assert told.running == 1


def test_many_at_once_get_what_each_gets_alone(ask: Callable[..., ChatCompletion]) -> None:
    questions = [f'How is "{word}" pronounced?' for word in ("mistral", "wind", "north", "cold", "dry", "strong")]
    alone = [text_of(ask(question)) for question in questions]
    assert len({*alone}) > 3
    with ThreadPoolExecutor(12) as pool:
        assert [*map(text_of, pool.map(ask, questions * 4))] == alone * 4


def test_every_stream_of_the_model_is_closed(
    ask: Callable[..., ChatCompletion], client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_released, release = 0, Steps.release

    def count(steps: Steps) -> None:
        nonlocal n_released
        n_released += 1
        release(steps)

    monkeypatch.setattr(Steps, "release", count)
    ask()
    ask(stop=text_of(ask())[1])
    assert n_released == 3
    hot: Any = {"temperature": 2, "max_tokens": 150, "seed": 4}
    with client.chat.completions.create(model="demo", messages=MESSAGES, stream=True, **hot) as events:
        next(events)
    until(lambda: n_released == 4)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotFiniteError("the model's logits are not finite"), "the model's logits are not finite"),
        (RuntimeError("secret"), "the answer failed; what the server has printed says why"),
    ],
)
def test_a_fault_of_ours_ends_one_answer(
    address: tuple[str, int], ask: Callable[..., ChatCompletion], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str,
) -> None:  # fmt: skip
    def fail(*_: Any, **__: Any) -> Iterator[str]:
        yield "half of "
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(line_module, "answer_text", fail)
        status, answer = post(address, json.dumps({"messages": MESSAGES}).encode())
        assert (status, answer["error"]["type"], answer["error"]["message"]) == (500, "server_error", said)
        with pytest.raises(openai.APIError, match=said):
            list(ask(stream=True))
    assert capsys.readouterr().err.count(str(error)) == 2
    assert text_of(ask())


# --- The page -------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(address: tuple[str, int]) -> None:
    with urllib.request.urlopen(url_of(address), timeout=60) as response:
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        page = response.read().decode()
    for outside in ("http:", "https:", "src=", "<link", "@import", "url("):
        assert outside not in page
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
        assert unsafe not in page
    for needed in (
        '<label for="question">',
        'role="log"',
        "prefers-color-scheme: dark",
        "AbortController",
        'lang="en"',
    ):
        assert needed in page


PAGE_IN_NODE = """
const parts = {}, asked = [];
const element = () => ({ textContent: "", value: "", remove() {}, scrollIntoView() {}, focus() {}, replaceChildren() {},
  appendChild: (child) => child });
globalThis.document = { getElementById: (id) => parts[id] ??= element(), createElement: element };
globalThis.fetch = async (url, options) => {
  if (url === "v1/models") return Response.json({ data: [{ id: "demo" }] });
  const { messages } = JSON.parse(options.body), last = messages.at(-1).content;
  asked.push(messages.map((message) => message.content).join(" "));
  if (messages.length > 3 || last === "long")
    return Response.json({ error: { message: "no room", code: "context_length_exceeded" } }, { status: 400 });
  const event = (delta, finish_reason) => `data: ${JSON.stringify({ choices: [{ delta, finish_reason }] })}\\n\\n`;
  return new Response(event({ content: last === "empty" ? "" : last.toUpperCase() }, null)
    + event({}, last === "cut" ? "length" : "stop") + "data: [DONE]\\n\\n");
};
globalThis.test = async () => {
  const notes = [];
  for (const question of ["a", "b", "long", "empty", "cut"]) {
    await ask(question);
    notes.push(parts.note.textContent);
  }
  console.log(JSON.stringify({ asked, notes }));
};
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's script in node")
def test_the_page_says_what_becomes_of_an_answer(tmp_path: Path) -> None:
    page = Path(server_module.__file__).with_name("page.html").read_text("utf-8")
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    (tmp_path / "page.js").write_text(f"{PAGE_IN_NODE}\n(() => {{{script}\nglobalThis.ask = ask;\n}})();\ntest();\n")
    done = subprocess.run(["node", tmp_path / "page.js"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["asked"] == [
        *("a", "a A b"),
        *("a A b B long", "b B long", "long"),  # after which all is as it was
        *("a A b B empty", "b B empty"),
        "b B cut",
    ]
    too_long = "the conversation is too long: its oldest part is left out"
    cut = "the answer is cut: it may have no more tokens"
    assert told["notes"] == ["", "", "no room", f"{too_long}; there is no answer", cut]


# --- The verb -------------------------------------------------------------------------------------------------------


def test_where_it_cannot_listen(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        for host, words in {
            "127.0.0.1": f"127.0.0.1:{port}: cannot listen there: Address already in use",
            "no-such-host.invalid": f"no-such-host.invalid:{port}: cannot listen there: ",
            "x" * 70 + ".invalid": "cannot listen there: ",
            "192.0.2.1": f"192.0.2.1:{port}: cannot listen there: Cannot assign requested address",
            "": f":{port}: cannot listen there",
        }.items():
            status, out, err = run("serve", "--host", host, "--port", port)
            assert (status, out, err.count("\n")) == (1, "", 1)
            assert words in err
            assert "name another --port or --host" in err
    for port in ("-1", "65536", "x"):
        assert run("serve", "--port", port)[0] == 2
    monkeypatch.setattr("minilora.errors.find_spec", lambda _: None)
    status, _, err = run("serve")
    assert status == 1
    assert err.endswith("needs starlette, which is not installed: pip install 'minilora[serve]'\n")


def test_the_verb_serves_what_it_is_told_to(run: Run, monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> None:
    made: list[Any] = []
    monkeypatch.setattr(server_module, "make_app", lambda _, offer, __: made.append(offer))
    monkeypatch.setattr(server_module, "run", lambda *given: (made.append(given[3]), given[2].close()))
    flags = ["--system", "Be brief.", "--top_p", 0.5, "--max_tokens", 99, "--host", "localhost", "--port", 0]
    status, out, err = run("serve", "--model.path", tiny_base, *flags)
    assert (status, out, err.count("\n")) == (0, "", 2)
    offer, hello = made
    assert (offer.name, offer.limit, offer.max_new_tokens, offer.system) == ("tiny", 99, 512, "Be brief.")
    assert offer.sampling == {"temperature": 0, "top_k": None, "top_p": 0.5, "seed": None}
    url = r"http://localhost:(\d+)"
    assert re.fullmatch(rf"minilora \S+ serves tiny: {url} \(a page\), {url}/v1 \(OpenAI's API\)", hello)
    run("serve", "--model.path", tiny_base, "--max_tokens", 10**6, "--port", 0)
    assert made[2].limit == 32_768, "the model's own limit"


def test_a_system_text_that_leaves_no_room_is_refused_at_once(
    run: Run, offer: Offer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "run", lambda *given: given[2].close())
    n = len(
        offer.tokenizer.encode_chat([{"role": "system", "content": "Be brief."}, MESSAGES[0] | {"content": "a"}])[0]
    )
    flags = ["--system", "Be brief.", "--port", 0, "--max_tokens"]
    said = f"one letter under --system fills {n} of {n} tokens: raise --max_tokens"
    assert run("serve", *flags, n) == (1, "", f"minilora serve: {said} or shorten --system\n")
    assert run("serve", *flags, n + 1)[0] == 0
    status, _, err = run("serve", "--port", 0, "--max_tokens", 1)
    assert (status, err.count("\n")) == (1, 1)
    assert err.endswith(" of 1 tokens: raise --max_tokens\n")


def test_the_model_is_named(run: Run, monkeypatch: pytest.MonkeyPatch, tiny_base: Path, tmp_path: Path) -> None:
    """By the run, and by no path."""
    made: list[Offer] = []
    monkeypatch.setattr(server_module, "make_app", lambda _, offer, __: made.append(offer))
    monkeypatch.setattr(server_module, "run", lambda *given: given[2].close())
    monkeypatch.chdir(tmp_path)
    model = add_lora(load_model(tiny_base), LoraConfig(rank=2))
    for folder in ("mine/adapter", "alone"):
        save_adapter(model, tmp_path / folder, provenance={"base_path": str(tiny_base)})
    weights = "mine/adapter/adapter_model.safetensors"
    for typed in ("mine", "mine/", "mine/adapter", weights, tmp_path / "mine/adapter", "alone", "./mine/../alone/"):
        assert run("serve", "--adapter", typed, "--port", 0)[0] == 0
        assert made[-1].name == ("alone" if "alone" in str(typed) else "mine")
    for given in ("our model", "our\nmodel"):
        run("serve", "--adapter", "alone", "--port", 0, "--name", given)
        assert made[-1].name == "our model"
    for given in ("", " \n "):
        refused(run("serve", "--adapter", "alone", "--port", 0, "--name", given), 2, "--name is blank")
    monkeypatch.setattr("minilora.hub._fetch", lambda *_: base_folder("demo"))
    assert run("serve", "--model.path", "org/tiny@main", "--port", 0)[0] == 0
    assert made[-1].name == "org/tiny"
    (tmp_path / "alone").rename(odd := tmp_path / os.fsdecode(b"odd\xff"))
    run("serve", "--adapter", odd, "--port", 0)
    assert made[-1].name == "odd\\udcff", "what can be sent and asked for"
    monkeypatch.chdir(tmp_path / "mine/adapter")
    run("serve", "--adapter", ".", "--port", 0)
    assert made[-1].name == "mine"


STUCK = """
import sys, time
from minilora import cli
from minilora.serve import line

def never(*_, **__):
    time.sleep(1e6)
    yield ""

line.answer_text = never
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "status", "run_by", "asked"),
    [
        (signal.SIGTERM, 143, ["-m", "minilora"], []),
        (signal.SIGHUP, 129, ["-m", "minilora"], []),
        (signal.SIGINT, 130, ["-m", "minilora"], [QUESTION] * 300),
        (signal.SIGTERM, 143, ["-c", STUCK], [QUESTION] * 3),
    ],
    ids=["idle", "hangup", "a line", "a token that never comes"],
)
def test_a_signal_ends_the_server(signum: int, status: int, run_by: list[str], asked: list[str]) -> None:
    """Also where many wait, and where the model cannot be stopped, as while it reads a prompt."""
    command = [sys.executable, "-W", "error", *run_by, "serve", "--model.device", "cpu"]
    command += ["--port", "0", "--max_tokens", "32768"]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            hello = process.stdout.readline()
            assert hello.endswith("/v1 (OpenAI's API)\n")
            address = ("127.0.0.1", int(hello.rpartition(":")[2].partition("/")[0]))
            if STUCK not in run_by:
                assert post(address, json.dumps({"messages": MESSAGES, "max_tokens": 2}).encode())[0] == 200
            hot: dict[str, Any] = {"temperature": 2, "stream": True}
            clients = [connect(address, messages=[{"role": "user", "content": text}], **hot) for text in asked]
            for client in clients:
                assert client.recv(12) == b"HTTP/1.1 200"  # it is in line
            process.send_signal(signum)
            out, err = process.communicate(timeout=60)
            for client in clients:
                client.close()
        finally:
            process.kill()
    assert (process.returncode, out) == (status, ""), err
    device, memory, *stopped = err.splitlines()
    assert (device[:7], memory[:7]) == ("device:", "memory:")
    assert stopped in ([], ["minilora serve: stopped"])
