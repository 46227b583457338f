"""A token's way through the model as a CUDA graph: launched once, by the host, instead of a thousand times.

A 7B's token is over on a fast GPU long before its host has made all launches. With a KV cache every step of one token
has the same shapes, so its launches are those of the step before: they are recorded once and replayed, on other
numbers in the same memory.

    first step     runs as it comes: kernels are compiled, libraries choose theirs
    second         recorded and replayed, and held against the same step as it comes
    all others     the token is copied to where the recorded kernels read, and replayed

Where recording fails, or says something else, a warning does, and steps go on as they come. Positions count up within
the step. Which token follows is chosen outside of it, where the host may wait for the GPU.
(`train/graph.py` does the same for a step of training.)
"""

import warnings

import torch
from torch import Tensor

from minilora.backend import has_kernels
from minilora.kv_cache import KVCache
from minilora.lora import casts
from minilora.model import Mistral

FEWEST = 8  # steps that are worth a recording, which takes the host about as long as two steps do
LARGEST_ERROR = 2**-4  # of logits in 16 bits, whose products another algorithm may sum in another order


class Steps:
    """Calls the model with one token after the other, by a graph where that pays.

    Meanwhile the model must stay as it is: its weights and adapters what and where they are, these on or off.
    """

    def __init__(self, model: Mistral, cache: KVCache, last: Tensor, n_steps: int) -> None:
        """last: (B, 1) int64, the position of each row's last token in the cache; n_steps: how many come, at most"""
        self._model, self._cache = model, cache
        self._tokens, self._positions = torch.zeros_like(last), last.clone()
        self._records, self._n_done = n_steps >= FEWEST and self.can_record(model.device), 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)  # the graph's
        self._casts = list[Tensor]()  # of the adapters, which the graph reads

    @staticmethod
    def can_record(device: torch.device) -> bool:
        """Whether a step can be recorded: where the kernels run, which never wait, on the GPU that torch records."""
        return has_kernels(device) and device.index == torch.cuda.current_device()

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) of what follows `tokens` (B,), the next ones of each row; valid until the next call."""
        self._tokens.copy_(tokens[:, None])
        self._n_done += 1
        if self._records and self._n_done == 2:
            return self._begin()
        if self._graph is None:
            return self.step()
        self._graph.replay()
        return self._logits

    def step(self) -> Tensor:
        """What is recorded: it finds tokens, positions and cache in the same memory every time. Logits (B, V)."""
        self._positions += 1
        hidden = self._model.hidden(self._tokens, self._positions, cache=self._cache)
        logits: Tensor = self._model.lm_head(hidden[:, -1])
        return logits

    def _begin(self) -> Tensor:
        """The second step: as it comes, and whether its recording says the same."""
        try:
            self._graph, self._logits = self._recorded()
            self._graph.replay()
            self._positions -= 1  # the same step again stores the same, where it was stored
            replayed, why = self._logits, "which says something else"
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            replayed, why = None, f"which fails ({first_line:.200})"
        logits = self.step()
        if replayed is None or not (replayed - logits).norm() <= LARGEST_ERROR * logits.norm():
            self.release()
            warnings.warn(f"decoding goes on without a CUDA graph, {why}; it is slower so", stacklevel=2)
        return logits

    def _recorded(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Only the host works meanwhile: positions and cache stay what they are. Adapters are cast before, once."""
        graph = torch.cuda.CUDAGraph()
        with (
            casts(self._model, self._model.dtype) as self._casts,
            torch.cuda.stream(torch.cuda.current_stream()),  # a recording that fails would leave its own stream current
            torch.cuda.graph(graph),
        ):
            logits = self.step()
        return graph, logits

    def release(self) -> None:
        """Give the recorded memory back: before work that has memory of its own."""
        self._casts = []
        if self._graph is not None:
            self._graph, self._logits = None, torch.empty(0)
            torch.cuda.empty_cache()
