"""Text from the model, token by token: prefill the prompt into the KV cache, then feed each choice back
(`decode_graph.py`).

    p(next) = softmax(logits / temperature), cut to the top_k likeliest and to the smallest set that holds top_p of it

Temperature 0 takes the likeliest token. A batch of unlike lengths is filled from the left with padding at negative
positions, which attention never sees, so a prompt gets the same answer alone and in company.
"""

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minilora.decode_graph import Steps
from minilora.errors import UserError
from minilora.kv_cache import KVCache
from minilora.model import Mistral, evaluating


class NotFiniteError(UserError):
    """Logits are not finite."""


def choose(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The next token (B,) int64 from logits (B, V)."""
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits = logits.float()
    check_finite(logits)
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)  # no overflow, however cold
    ranked, tokens = probabilities.sort(-1, descending=True)
    ranked[:, 1:][ranked.cumsum(-1)[:, :-1] >= top_p] = 0  # keeps every token that begins below top_p, and the first
    if top_k is not None:
        ranked[:, top_k:] = 0
    drawn = torch.multinomial(ranked, 1, generator=generator)
    return tokens.gather(-1, drawn)[:, 0]


def check_finite(logits: Tensor) -> None:
    """Raise NotFiniteError where some are not, which the likeliest would not show."""
    if not bool(logits.isfinite().all()):
        raise NotFiniteError("the model's logits are not finite: its weights, or its adapter's, are damaged")


@torch.inference_mode()
def stream(
    model: Mistral,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_id: int | None = None,
    n_padding: Tensor | None = None,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Yield up to max_new_tokens times the next token of each sequence, (B,) int64.

    tokens: (B, T) int64, T >= 1; n_padding: (B,), how many tokens at the left of each row are padding
    eos_id: a row that has chosen it goes on yielding it; when every row has, the stream ends
    seed: of the draws where temperature > 0; None draws from torch's global state
    Until it ends or is closed the model is in evaluation mode. Warns where the text outgrows `max_seq_len`: beyond that
    the model was never trained. Raises ValueError for arguments out of range.
    """
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must be (B, T) with T >= 1, not {tuple(tokens.shape)}")
    if not temperature >= 0 or not 0 <= top_p <= 1 or (top_k is not None and top_k < 1) or max_new_tokens < 0:
        raise ValueError(
            f"temperature {temperature} must be >= 0, top_p {top_p} in [0, 1], top_k {top_k} >= 1, "
            f"max_new_tokens {max_new_tokens} >= 0"
        )
    if (stray := tokens[(tokens < 0) | (tokens >= model.config.vocab_size)]).numel():  # which a GPU would die of
        raise ValueError(f"tokens hold the id {stray[0]}, but the model's go from 0 to {model.config.vocab_size - 1}")
    B, T = tokens.shape
    tokens = tokens.to(model.device)
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    positions, last = None, torch.full((B, 1), T - 1, device=model.device)
    if n_padding is not None and bool(n_padding.any()):  # without padding prompts need no mask
        positions = torch.arange(T, device=model.device) - n_padding.to(model.device)[:, None]
        last = positions[:, -1:]
    max_len = -(-(T + max_new_tokens) // 8) * 8  # a GPU's attention takes masks whose rows are whole 16 bytes
    cache = KVCache(model.config, B, max_len, model.dtype, model.device)
    ended, following = torch.zeros(B, dtype=torch.bool, device=model.device), tokens[:, -1]
    step = Steps(model, cache, last, max_new_tokens - 1)
    limit = model.config.max_seq_len
    try:
        with evaluating(model):
            for n in range(max_new_tokens):
                if T + n == max(T, limit + 1):
                    warnings.warn(f"the text goes beyond the model's max_position_embeddings, {limit}", stacklevel=2)
                logits = step(following) if n else model.lm_head(model.hidden(tokens, positions, cache=cache)[:, -1])
                if not n:
                    check_finite(logits)
                following = choose(logits, temperature, top_k, top_p, generator)
                if eos_id is not None:
                    following = following.where(~ended, eos_id)
                    ended |= following == eos_id
                yield following
                if eos_id is not None and bool(ended.all()):
                    return
    finally:
        step.release()


def generate(
    model: Mistral,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_id: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """Continue tokens (B, T) int64: the prompt and up to max_new_tokens more, (B, T + new). See `stream`."""
    steps = stream(
        model, tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, eos_id=eos_id, seed=seed
    )
    return torch.cat([tokens.to(model.device), *(step[:, None] for step in steps)], dim=1)


def answer(
    model: Mistral, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_id: int, batch_size: int = 8
) -> list[list[int]]:
    """The likeliest continuation of each prompt up to, without, eos: token ids in the prompts' order.

    Prompts of like length share a batch.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = len(prompts[batch[-1]])
        n_padding = torch.tensor([longest - len(prompts[i]) for i in batch])
        tokens = torch.tensor([[0] * (longest - len(prompts[i])) + list(prompts[i]) for i in batch])
        steps = list(stream(model, tokens, max_new_tokens, eos_id=eos_id, n_padding=n_padding))
        for i, row in zip(batch, torch.stack(steps, dim=1).tolist(), strict=True):
            answers[i] = row[: row.index(eos_id)] if eos_id in row else row
    return answers
