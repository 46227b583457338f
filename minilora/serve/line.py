"""A model that answers one at a time, in a thread of its own, and the line of those who wait for it.

The thread does not wait for who listens: a slow reader keeps nobody in line. Who goes away is passed over, or ends its
answer at the next token.
"""

import asyncio
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from threading import Event

from minilora.backend import pick_device
from minilora.chat import answer_text
from minilora.model import Mistral
from minilora.serve.request import Ask
from minilora.tokenizer import Tokenizer

Said = tuple[str, int, str | None]  # text, the answer's tokens so far, and at its end why: "stop" or "length"


class Stops:
    """The text before the stop string that is whole first. What may be the beginning of one is held back.

    held: that beginning; where no more comes, it is text
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops, self.held, self.found = stops, "", False

    def add(self, piece: str) -> str:
        """The text that this piece makes final."""
        self.held += piece
        whole = [(start + len(stop), start) for stop in self._stops if (start := self.held.find(stop)) >= 0]
        self.found = bool(whole)
        final = min(whole)[1] if whole else len(self.held) - max(map(self._begun, self._stops), default=0)
        text, self.held = self.held[:final], self.held[final:]
        return text

    def _begun(self, stop: str) -> int:
        """How many characters of a stop the text ends with."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)


def answer(model: Mistral, tokenizer: Tokenizer, ask: Ask) -> Generator[Said, None, None]:
    """The answer by pieces, one a token. A token that ends it counts; what would follow a stop is not made."""
    stops, n, most = Stops(ask.stops), 0, ask.max_new_tokens
    with closing(answer_text(model, tokenizer, ask.prompt, most, **ask.sampling)) as pieces:
        for n, piece in enumerate(pieces, 1):  # the last piece is of the token that ends the answer, or of none
            text = stops.add(piece)
            if stops.found:
                yield text, min(n, most), "stop"
                return
            yield text, n, None
    yield stops.held, min(n, most), "length" if n > most else "stop"


class Line:
    """Who waits is a task that the thread has not begun."""

    def __init__(self, model: Mistral, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        # Which GPU is torch's current one is a thread's own matter.
        self._thread = ThreadPoolExecutor(1, "model", pick_device, (str(model.device),))

    async def answer(self, ask: Ask) -> AsyncGenerator[Said, None]:
        """See `answer`, whose errors it raises. Where it is closed or cancelled it gives up its turn."""
        said, gone, loop = asyncio.Queue[Said | None](), Event(), asyncio.get_running_loop()

        def work() -> None:
            with closing(answer(self._model, self._tokenizer, ask)) as pieces:
                try:
                    for piece in pieces:
                        if gone.is_set():
                            break
                        loop.call_soon_threadsafe(said.put_nowait, piece)
                finally:
                    loop.call_soon_threadsafe(said.put_nowait, None)

        turn = self._thread.submit(work)
        try:
            while (piece := await said.get()) is not None:
                yield piece
            await asyncio.wrap_future(turn)
        finally:
            gone.set()
            turn.cancel()

    def ends(self, seconds: float) -> bool:
        """Whether the thread is idle within these seconds, once all who asked have gone."""
        return not wait([self._thread.submit(int)], seconds).not_done
