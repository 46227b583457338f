"""Memory that is used again: by the same thread for the same purpose, and by no one else."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
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


COUNT_NEW_PAGES = """
import resource, sys, torch
from minilora.scratch import keep_freed_memory

def step():  # as one does: what forward keeps goes at its end
    return [torch.ones(n << 18) for n in (3, 7, 2, 5, 8)]

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(1)
keep_freed_memory(short=len(sys.argv) > 1)
step(), step()
print(new_pages())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="glibc's malloc")
@pytest.mark.parametrize(
    ("setting", "short", "is_new"),
    [
        ({}, [], False),
        ({}, ["short"], True),
        ({"MALLOC_MMAP_THRESHOLD_": "65536"}, [], True),
        ({"MALLOC_MMAP_THRESHOLD_": "33554432"}, ["short"], False),
    ],
)
def test_a_second_step_needs_no_new_pages_unless_memory_is_short_or_the_user_says_so(
    setting: dict[str, str], short: list[str], is_new: bool
) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | setting
    command = [sys.executable, "-c", COUNT_NEW_PAGES, *short]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    # 25 MiB are 6400 pages of 4 KiB, or fewer where the system gives large ones: 12 of 2 MiB.
    assert (int(done.stdout) >= 12) == is_new


COUNT_LARGE_PAGES = """
import sys
import torch
from minilora.scratch import keep_freed_memory

torch.ones(1)
keep_freed_memory(large_pages=len(sys.argv) > 1)
kept = [torch.ones(1 << 22) for _ in range(8)]  # 16 MiB each
rollup = dict(line.split()[:2] for line in open("/proc/self/smaps_rollup"))
print(rollup["AnonHugePages:"])
"""
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PAGE_BYTES = LARGE_PAGES.with_name("hpage_pmd_size")
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="glibc's malloc")
@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(), reason="the system gives no large pages"
)
@pytest.mark.skipif(
    not PAGE_BYTES.exists() or int(PAGE_BYTES.read_text()) != 2 << 20, reason="large pages are not of 2 MiB here"
)
@pytest.mark.skipif(
    OVERCOMMIT.exists() and int(OVERCOMMIT.read_text()) == 2, reason="the system promises no more memory than it has"
)
def test_the_heap_lies_in_large_pages_if_asked_for_unless_the_user_says_otherwise() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command, plain = [sys.executable, "-c", COUNT_LARGE_PAGES], env | {"MALLOC_TOP_PAD_": "131072"}
    large, *small = (
        int(subprocess.run([*command, *asked], env=e, capture_output=True, check=True).stdout)
        for asked, e in ((["large"], env), (["large"], plain), ([], env))
    )
    assert large >= 32 << 10  # KiB, of 128 MiB; a system short of them gives fewer
    assert "[always]" in LARGE_PAGES.read_text() or max(small) < 10 << 10
