"""NEFTune (https://arxiv.org/abs/2310.05914): noise on the embeddings while training, so that less is learnt by heart.

    x + u * alpha / sqrt(T * D)        u uniform in (-1, 1), T the tokens of the sample, D the size of an embedding

In a packed row T is the length of the sample that a token belongs to, so it has the noise that it would have alone.
(Where peers pad, T is the length of the longest sample of the batch.) u comes from torch's global random state, which a
run's checkpoints hold.
"""

import torch
from torch import Tensor


def with_noise(x: Tensor, segments: Tensor | None, alpha: float) -> Tensor:
    """Embeddings x (B, T, D), noise added, in x's dtype; segments (B, T) tell the samples, None: a row is one."""
    lengths = torch.full(x.shape[:2], x.shape[1], dtype=torch.float32, device=x.device)
    if segments is not None:
        segments = segments.long()
        counts = torch.zeros(len(x), int(segments.max()) + 1, device=x.device)
        lengths = counts.scatter_add_(1, segments, torch.ones_like(lengths)).gather(1, segments)
    bound = alpha / (lengths * x.shape[-1]).sqrt()
    return x + torch.empty_like(x).uniform_(-1, 1) * bound[..., None].to(x.dtype)
