"""A request of the chat-completions API, as what the model is asked.

The API's fields are of four kinds: those that are followed; those that change nothing about an answer and are passed
over; those that would change it by something that is not here, which pass only where they ask for nothing; and all
others, which may be misspelt ones of the first kind. What is refused is refused in a sentence that names the field.

Source: https://platform.openai.com/docs/api-reference/chat/create.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from minilora.checkpoint.json_file import parse_object, short
from minilora.conversation import kind, read_conversation
from minilora.errors import UserError
from minilora.tokenizer import Tokenizer

FOLLOWED = (
    *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop"),
    *("stream", "stream_options"),
)
PASSED_OVER = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_retention", "tool_choice"),  # the latter: of no tools
)
ASKS_FOR_NOTHING: Mapping[str, Any] = {
    "n": 1, "tools": [], "logprobs": False, "top_logprobs": 0, "logit_bias": {},
    "presence_penalty": 0, "frequency_penalty": 0, "response_format": {"type": "text"}, "modalities": ["text"],
}  # fmt: skip
OF_A_MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id")  # others, such as weight, are for training
MAX_STOPS, MAX_STOP = 4, 1000  # how many, and the characters of one


class Refused(UserError):  # noqa: N818 - as Stopped is
    """A request that is not answered: the HTTP status, and the field that is to blame."""

    def __init__(self, message: str, field: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.field, self.status, self.code = field, status, code


@dataclass(frozen=True)
class Offer:
    """What is served, and what holds where a request says nothing.

    limit: tokens of a prompt and its answer together; sampling: as in `generation.stream`
    """

    name: str
    tokenizer: Tokenizer
    limit: int
    max_new_tokens: int
    system: str | None
    sampling: Mapping[str, Any]

    def check_room(self) -> None:
        """Raises UserError where no question could be answered."""
        if (n := len(_prompt([{"role": "user", "content": "a"}], self))) >= self.limit:
            under, say = (" under --system", " or shorten --system") if self.system else ("", "")
            raise UserError(f"one letter{under} fills {n:,} of {self.limit:,} tokens: raise --max_tokens{say}")

    def check_model(self, name: Any) -> None:
        """Raises Refused for another model."""
        if name != self.name:
            raise Refused(f"there is no model {short(name)}, but {self.name}", "model", 404, "model_not_found")


@dataclass(frozen=True)
class Ask:
    """usage: whether a stream ends with the number of its tokens"""

    prompt: list[int]
    max_new_tokens: int
    sampling: Mapping[str, Any]
    stops: tuple[str, ...]
    stream: bool
    usage: bool


def read_ask(data: bytes, offer: Offer) -> Ask:
    """The body of a request. Raises Refused."""
    try:
        fields = {name: value for name, value in parse_object(data).items() if value is not None}
    except ValueError as error:
        raise Refused(f"the body is no JSON object: {error}") from None
    for name, value in fields.items():
        nothing = ASKS_FOR_NOTHING.get(name)
        if name not in (*FOLLOWED, *PASSED_OVER) and (kind(value), value) != (kind(nothing), nothing):  # true is no 1
            raise Refused(f"{name} {short(value)} is not supported; leave it out", short(name)[1:-1])
    offer.check_model(fields.get("model", offer.name))
    if "max_tokens" in fields and "max_completion_tokens" in fields:
        raise Refused("max_tokens and max_completion_tokens are two names of one limit; give one", "max_tokens")
    sampling = {
        "temperature": _number(fields, "temperature", 0, 2),
        "top_p": _number(fields, "top_p", 0, 1),
        "seed": _number(fields, "seed", -(2**63), 2**63 - 1, int),
    }
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if "seed" in sampling or sampling.get("top_p", 1) < 1:  # who says how to draw wants draws, by the API's default
        sampling = {"temperature": offer.sampling["temperature"] or 1.0} | sampling
    wanted = _number(fields, "max_tokens", 1, offer.limit, int)
    wanted = _number(fields, "max_completion_tokens", 1, offer.limit, int) or wanted
    stop = _value(fields, "stop", [], _are_stops, f"up to {MAX_STOPS} texts of 1 to {MAX_STOP:,} characters")
    options = _value(fields, "stream_options", {}, lambda v: isinstance(v, dict), "an object")
    if unknown := sorted(options.keys() - {"include_usage", "include_obfuscation"}):  # the latter is passed over
        raise Refused(f"stream_options: {short(unknown[0])} is not supported; leave it out", "stream_options")
    prompt = _prompt(fields.get("messages"), offer)
    room = offer.limit - len(prompt)
    if room < (wanted or 1):
        say = f"the messages have {len(prompt):,} tokens and the answer {wanted or 1:,}, but there is room for"
        raise Refused(f"{say} {offer.limit:,}; ask for less", "messages", code="context_length_exceeded")
    return Ask(
        prompt,
        wanted or min(room, offer.max_new_tokens),
        {**offer.sampling, **sampling},
        (stop,) if isinstance(stop, str) else tuple(stop),
        _switch(fields, "stream"),
        _switch(options, "include_usage"),
    )


def _prompt(messages: Any, offer: Offer) -> list[int]:
    if not isinstance(messages, list) or not messages:
        what = "empty" if messages == [] else kind(messages)
        raise Refused(f"messages is {what}, but must be a list of messages", "messages")
    said = [{k: m[k] for k in OF_A_MESSAGE if k in m} if isinstance(m, dict) else m for m in messages]
    said = [m | {"role": "system"} if isinstance(m, dict) and m.get("role") == "developer" else m for m in said]
    said = [m for m in said if not _is_silent(m)]
    try:
        read_conversation(said, offer.tokenizer.version)  # before a message that is not the client's is counted
        if said[-1]["role"] == "assistant":
            raise UserError("the last message is the assistant's; let a user's follow")
        if offer.system and all(m["role"] != "system" for m in said):
            said.insert(0, {"role": "system", "content": offer.system})
        return offer.tokenizer.encode_chat(said)[0]
    except UserError as error:
        raise Refused(str(error), "messages") from None


def _is_silent(message: Any) -> bool:
    """An answer of no text, as one is that a stop or </s> began, and clients send it back."""
    ours = isinstance(message, dict) and message.get("role") == "assistant"
    return ours and message.get("content") in (None, "") and not message.get("tool_calls")


def _are_stops(given: Any) -> bool:
    stops = [given] if isinstance(given, str) else given
    few = isinstance(stops, list) and len(stops) <= MAX_STOPS
    return few and all(isinstance(stop, str) and 1 <= len(stop) <= MAX_STOP for stop in stops)


def _number(fields: Mapping[str, Any], name: str, least: int, most: int, of: Any = int | float) -> Any:
    def fits(value: Any) -> bool:
        return isinstance(value, of) and not isinstance(value, bool) and least <= value <= most

    return _value(fields, name, None, fits, f"a {'whole ' * (of is int)}number from {least:,} to {most:,}")


def _switch(fields: Mapping[str, Any], name: str) -> Any:
    return _value(fields, name, False, lambda value: isinstance(value, bool | None), "true or false")


def _value(fields: Mapping[str, Any], name: str, default: Any, fits: Callable[[Any], bool], must: str) -> Any:
    if (value := fields.get(name, default)) is not default and not fits(value):
        raise Refused(f"{name} is {short(value)}, but must be {must}", name)
    return value
