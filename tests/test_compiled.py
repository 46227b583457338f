"""Compiled loops against the definitions they are made of, and a run with them. Where bits may differ, both are held to
float64."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import kernel_cases
import pytest
import torch
from kernel_cases import assert_no_worse
from marks import compiles_loops
from test_fused import SHAPES, adapted, distance, gradients
from tiny_runs import MakeConfig, Quiet, Run, refused, stop_after
from torch import Tensor

from minilora import compiled, norm, rope, swiglu
from minilora.backend import told
from minilora.compiled import compile_loops, compiles
from minilora.errors import UserError
from minilora.fast_block import fuse
from minilora.loss import _exponentials
from minilora.nf4 import CPU, quantize_nf4
from minilora.toml import config_toml
from minilora.train.loop import Stopped, fine_tune

pytestmark = [compiles_loops, pytest.mark.slow]
random = partial(kernel_cases.random, device=CPU)
N, D, HEADS, HEAD_DIM = 24, 96, 3, 32
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def as_they_stand() -> Iterator[None]:
    yield
    compile_loops(False)


def both(call: Callable[[], Any], is_compiled: bool = True) -> tuple[Any, Any]:
    """What `call` gives where loops are compiled, one of it or none, and as it stands."""
    compile_loops(True)
    with patch.object(compiled, "_compiled", wraps=compiled._compiled) as asked_for:
        made = call()
    assert asked_for.called == is_compiled
    compile_loops(False)
    return made, call()


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    wide = {name: random(N, D, seed=i, dtype=dtype) for i, name in enumerate("abc")}
    angles = random(N, HEAD_DIM // 2, seed=5)
    return wide | {
        "weight": random(D, seed=3), "inverse": random(N, 1, seed=4).abs(),
        "x": random(N, HEADS, HEAD_DIM, dtype=dtype), "cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype),
    }  # fmt: skip


Call = Callable[..., Any]
CALLS: dict[str, Call] = {
    "rms_norm": lambda a, weight, **_: norm.rms_norm(a, weight.to(a.dtype), 1e-5, a.dtype),
    "rms_norm, made again": lambda a, weight, inverse, **_: norm.rms_norm(a, weight, 1e-5, a.dtype, inverse)[0],
    "add_rms_norm": lambda a, b, weight, **_: norm.add_rms_norm(a, b, weight, 1e-5, a.dtype),
    "rms_norm_backward": lambda a, b, c, weight, inverse, **_: norm.rms_norm_backward(a, b, weight, inverse, c),
    "rotate": lambda x, cos, sin, **_: rope.rotate(x, cos, sin),
    "rotate_back": lambda x, cos, sin, **_: rope.rotate_back(x, cos, sin),
    "swiglu": lambda a, b, **_: swiglu.swiglu(a, b),
    "swiglu_backward": lambda a, b, c, **_: swiglu.swiglu_backward(a, b, c),
}  # fmt: skip


def as_tuple(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


@pytest.mark.parametrize("name", CALLS)
def test_a_loop_errs_no_more_than_its_definition(name: str) -> None:
    """In 16 bits, which are rounded once, at the end. The model's gradients, below, hold float32."""
    given = tensors(torch.bfloat16)

    def call() -> Any:
        return CALLS[name](**{name: tensor.clone() for name, tensor in given.items()})

    exact = CALLS[name](**{name: tensor.double() for name, tensor in given.items()})
    for ours, plain, want in zip(*map(as_tuple, (*both(call), exact)), strict=True):
        assert_no_worse(ours, plain, exact=want.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_become_exponentials_tile_by_tile(dtype: torch.dtype) -> None:
    z, at = random(N, D, dtype=dtype), torch.arange(N)[:, None] * 8 - 20  # labels before, in and behind the tile
    largest, sums, label = random(N, 1, seed=1) + 2, random(N, 1, seed=2).exp(), random(N, 1, seed=3)

    def call() -> tuple[Tensor, ...]:
        return _exponentials(z.clone(), at, largest.clone(), sums.clone(), label.clone(), dtype)

    ours, plain = both(call)
    assert ours[0].dtype == dtype
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=2 * torch.finfo(mine.dtype).eps + 1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "double_quant"), [((48, 64), True), ((6, 96), False), ((3, 27), True)])
def test_decoded_weights_have_the_same_bits(shape: tuple[int, int], double_quant: bool, dtype: torch.dtype) -> None:
    """Rows of whole blocks, blocks across rows, and a short last block, which is decoded as it stands."""
    weight = quantize_nf4(random(*shape), double_quant=double_quant)
    ours, plain = both(lambda: weight.dequantize(dtype), is_compiled=weight.n % 64 == 0)
    assert ours.equal(plain)
    part = 2 * 64
    if weight.n > 2 * part:

        def some() -> Tensor:
            out = torch.empty(part, dtype=dtype)
            weight.decode(part, 2 * part, out)
            return out

        assert all(out.equal(plain.flatten()[part : 2 * part]) for out in both(some))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [250, 300])
def test_blocks_of_several_groups_of_absmax_have_the_same_bits(first: int, dtype: torch.dtype) -> None:
    """256 blocks share a nested absmax; from within the first, or the second, to within the third."""
    weight, size = quantize_nf4(random(600, 64)), 64
    out = torch.empty((520 - first) * size, dtype=dtype)

    def some() -> Tensor:
        weight.decode(first * size, 520 * size, out)
        return out.clone()

    ours, plain = both(some)
    assert ours.equal(plain)
    assert plain.equal(weight.dequantize(dtype).flatten()[first * size : 520 * size])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_with_compiled_loops_has_the_plain_blocks_gradients(dtype: torch.dtype) -> None:
    plain = adapted(SHAPES[1], nf4=dtype == torch.float32).to(dtype)
    exact = gradients(copy.deepcopy(plain).double(), packed=True)[1] if dtype != torch.float32 else None
    fast = copy.deepcopy(plain)
    assert fuse(fast)
    compile_loops(True)
    ours = gradients(fast, packed=True)[1]
    compile_loops(False)
    theirs = gradients(plain, packed=True)[1]
    if exact is None:
        assert distance(ours, theirs) < 1e-5
    else:
        assert 0 < distance(ours, exact) <= 2 * distance(theirs, exact)


def test_a_run_compiles_what_it_is_asked_to_and_resumes_exactly(make_config: MakeConfig, tmp_path: Path) -> None:
    def config(folder: str, on: bool = True) -> Any:
        return make_config(eval__answers=0, eval__samples=0, train__compile=on, train__output=str(tmp_path / folder))

    said = Quiet()
    straight = fine_tune(config("straight"), said).folder.path
    assert compiles(CPU)
    assert told(CPU) in said.said
    assert "compiled to C++" in told(CPU)
    with pytest.raises(Stopped):
        fine_tune(config("cut"), stop_after(2, Quiet()))
    cut = fine_tune(config("cut"), Quiet(), resume=True).folder.path
    for file in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (cut / file).read_bytes() == (straight / file).read_bytes(), file
    with pytest.raises(UserError, match=r"train\.compile"):
        fine_tune(config("cut", on=False), Quiet(), resume=True)
    fine_tune(config("plain", on=False), Quiet())
    assert not compiles(CPU)


def test_without_a_compiler_a_run_is_refused_in_one_line(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    import torch._inductor.config

    (tmp_path / "run.toml").write_text(config_toml(make_config(train__compile=True)))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    compiled._compiled.cache_clear()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):  # which monkeypatch could not put back
        got = run("train", tmp_path / "run.toml")
    refused(got, 1, "train.compile: torch cannot compile (", "no-such-compiler")
