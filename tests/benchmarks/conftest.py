"""Contestants within the test's own process: to start one takes seconds, and test_harness.py starts enough of them."""

import gc
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest

from benchmarks import contestants, harness, nf4_cpu, scaling
from benchmarks.harness import Contestant, ContestantError, Measured, Worker
from benchmarks.shapes import SHAPES
from minilora.compiled import compile_loops
from minilora.train import setup


class NoProcess(Worker):
    """A Worker's steps without its process and environment. What goes to and fro is JSON all the same."""

    def __init__(self, contestant: Contestant, *_: float) -> None:
        module, _, function = contestant.factory.partition(":")
        self._step = _answer(getattr(import_module(module), function), contestant.arguments)
        self.rest_bytes = harness.private_bytes()
        gc.freeze()  # what has been imported: see tests/conftest.py

    def step(self, *_: Any, watch: bool = True, **arguments: Any) -> Measured:  # noqa: ARG002
        return Measured(**_answer(lambda **sent: json.loads(json.dumps(harness._timed(self._step, sent))), arguments))

    def close(self) -> None:
        del self._step


def _answer(work: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    sent = json.loads(json.dumps(dict(arguments)))
    try:
        return work(**sent)
    except Exception as error:
        raise ContestantError(harness._failure(error)["error"]) from None


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nor a heap that is kept in another way from then on; and a tiny shape of few words, whose head costs little."""
    monkeypatch.setitem(SHAPES, "tiny", replace(SHAPES["tiny"], vocab_size=512))
    for module in (harness, nf4_cpu, scaling):
        monkeypatch.setattr(module, "Worker", NoProcess)
    for module in (contestants, nf4_cpu, setup):
        monkeypatch.setattr(module, "keep_freed_memory", lambda *_, **__: None)
    yield
    compile_loops(False)
