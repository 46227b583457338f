"""A conversation, turn by turn, each answered under all that was said before.

It is encoded anew for each answer, since some templates put the system's text into the last question. Where it outgrows
its limit the oldest exchanges are left out.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import torch

from minilora.generation import stream
from minilora.model import Mistral
from minilora.tokenizer import TextStream, Tokenizer


def answer_text(
    model: Mistral, tokenizer: Tokenizer, prompt: Sequence[int], max_new_tokens: int, **sampling: Any
) -> Generator[str, None, None]:
    """The answer to a prompt's ids: a piece, often "", for each token before </s>, and one more of what was held back.

    sampling: as in `generation.stream`
    """
    text = TextStream(tokenizer)
    for token in stream(model, torch.tensor([prompt]), max_new_tokens, eos_id=tokenizer.eos_id, **sampling):
        if int(token) == tokenizer.eos_id:
            break
        yield text.add(int(token))
    yield text.end()


def converse(
    model: Mistral,
    tokenizer: Tokenizer,
    questions: Iterable[str],
    say: Callable[[str], object],
    note: Callable[[str], object],
    system: str | None,
    limit: int,
    max_new_tokens: int,
    **sampling: Any,
) -> None:
    """Answer each question by pieces to `say`, a line's end behind each answer. Ctrl-C ends an answer, not the
    conversation, and what was said of it counts.

    note: told in a line what is beside the conversation
    limit: tokens of a prompt
    """
    first = [{"role": "system", "content": system}] if system else []
    said = list[dict[str, str]]()
    for question in filter(str.strip, questions):
        turn = {"role": "user", "content": question}
        if (alone := len(tokenizer.encode_chat([*first, turn])[0])) > limit:
            note(f"this has {alone:,} tokens{' with the system text' * bool(system)}, but may have {limit:,}: ask less")
            continue
        said.append(turn)
        while len(prompt := tokenizer.encode_chat([*first, *said])[0]) > limit:
            note(f"the conversation has {len(prompt):,} tokens, of at most {limit:,}: its oldest exchange is left out")
            del said[:2]
        answer = ""
        try:
            for piece in answer_text(model, tokenizer, prompt, max_new_tokens, **sampling):
                say(piece)
                answer += piece
        except KeyboardInterrupt:
            pass
        say("\n")
        if answer.strip():
            said.append({"role": "assistant", "content": answer})
        else:
            note("there is no answer, so the question is forgotten")
            said.pop()
