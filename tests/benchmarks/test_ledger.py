"""What the ledger predicts against every byte that a real step takes, as benchmarks/watch.py sees them."""

from itertools import product

import pytest
import torch

from benchmarks.feeds import random_batch
from benchmarks.ledger import CLOSE, Cell, _step, random_model, run_config
from benchmarks.shapes import shape
from minilora import scratch
from minilora.train.ledger import Ledger

AT_REST = ("packed weights", "absmax", "embeddings, head, norms", "adapters")


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("dtype", "checkpointing"), list(product(["float32", "bfloat16"], [False, True])))
def test_a_step_takes_what_was_predicted(dtype: str, checkpointing: bool, rows: int) -> None:
    cell = Cell("tiny", rows, 256, dtype, checkpointing)
    sizes = shape(cell.shape)
    batch = random_batch(cell.rows, cell.length, sizes.vocab_size)
    predicted = Ledger(run_config(cell), sizes, torch.device("cpu"), batch, cell.length).predict()
    assert predicted.pop("process") > 0
    scratch._held.__dict__.clear()  # of larger models that were here before
    step = _step(cell, random_model(sizes, getattr(torch, dtype)))
    step()
    measured, _ = step()
    assert {owner: measured[owner] for owner in AT_REST} == {owner: predicted[owner] for owner in AT_REST}
    assert abs(sum(predicted.values()) / sum(measured.values()) - 1) <= CLOSE
    assert measured.keys() >= {"attention", "residual stream"} | (set() if checkpointing else {"adapter inputs"})
