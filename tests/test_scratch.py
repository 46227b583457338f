"""Memory that is used again: by the same thread for the same purpose, and by no one else."""

from concurrent.futures import ThreadPoolExecutor

import torch

from minilora.scratch import scratch

CPU = torch.device("cpu")


def test_the_same_purpose_gets_the_same_memory_again() -> None:
    first = scratch("a", 10, torch.float32, CPU)
    assert scratch("a", 6, torch.float32, CPU).data_ptr() == first.data_ptr()
    assert len(scratch("a", 6, torch.float32, CPU)) == 6
    larger = scratch("a", 1000, torch.float32, CPU)
    assert len(larger) == 1000
    assert scratch("a", 10, torch.float32, CPU).data_ptr() == larger.data_ptr()


def test_nobody_elses_memory_is_given() -> None:
    mine = scratch("a", 10, torch.float32, CPU)
    with ThreadPoolExecutor(1) as thread:
        theirs = thread.submit(scratch, "a", 10, torch.float32, CPU).result()
    others = [scratch("b", 10, torch.float32, CPU), scratch("a", 10, torch.int32, CPU), theirs]
    assert len({t.data_ptr() for t in [mine, *others]}) == 4


def test_memory_that_generation_made_serves_training() -> None:
    with torch.inference_mode():
        scratch("generation", 4, torch.float32, CPU)
    buffer = scratch("generation", 4, torch.float32, CPU)
    buffer.zero_()
    assert not buffer.is_inference()
