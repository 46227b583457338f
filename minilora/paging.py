"""An optimizer's state in host memory, on the GPU page by page: paged optimizers (https://arxiv.org/abs/2305.14314).

There are two lanes, each a place for one page on the GPU and a stream; pages take them in turn. What happens to a page
follows on its lane, so that one is copied while the other's is updated, both ways at once:

    lane 0    in 0   update 0   out 0       in 2   update 2   out 2
    lane 1           in 1       update 1   out 1              in 3 ...

bitsandbytes has the driver move pages (CUDA's unified memory), as they are touched and as memory runs out; here the
copies are explicit, always made, and at the link's full rate, which unified memory does not reach.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Lane:
    """Where one page at a time is on the device. On a CPU it is copied likewise, without a stream: for tests."""

    def __init__(self, parts: Iterable[tuple[int, torch.dtype]], device: torch.device) -> None:
        """parts: how many numbers a page has of each part of the state, and their dtype"""
        self._here = [torch.empty(n, dtype=dtype, device=device) for n, dtype in parts]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def holding(self, page: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """The page's parts on the device while entered; what is done to them there reaches the host, some time before
        `settle` is over. After all that the current stream has been given."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            pairs = [(there, here[: len(there)]) for there, here in zip(page, self._here, strict=True)]
            yield [here.copy_(there, non_blocking=True) for there, here in pairs]
            for there, here in pairs:
                there.copy_(here, non_blocking=True)

    def settle(self) -> None:
        """Wait until all is done that the lane was given."""
        if self._stream is not None:
            self._stream.synchronize()
