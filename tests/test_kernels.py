"""A kernel is whole when five places exist: definition, kernel, test, benchmark, and its row in kernels/README.md."""

import ast
import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

from minilora import adamw, dispatch, nf4, norm, rope, softmax_gradient, swiglu

ROOT = Path(__file__).parents[1]
OPERATIONS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if path.stem != "nf4_table")
# The launchers, and what each does the same as: torch's own product has no name of ours.
DEFINITIONS: dict[str, dict[str, Callable[..., object]]] = {
    "adamw": {f.__name__: f for f in (adamw.adamw_, adamw.adamw_8bit_)},
    "nf4_dequantize": {"dequantize": nf4.NF4Tensor.dequantize},
    "nf4_quantize": {"quantize_nf4": nf4.quantize_nf4},
    "nf4_matvec": {"matvec": torch.matmul},
    "nf4_matmul": {"matmul": torch.matmul},
    "norm": {f.__name__: f for f in (norm.rms_norm, norm.add_rms_norm, norm.rms_norm_backward)},
    "rope": {f.__name__: f for f in (rope.rotate, rope.rotate_back)},
    "softmax_gradient": {"softmax_gradient_": softmax_gradient.softmax_gradient_},
    "swiglu": {f.__name__: f for f in (swiglu.swiglu, swiglu.swiglu_backward)},
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_five_places_of_a_kernel(name: str) -> None:
    for launcher, definition in DEFINITIONS[name].items():
        ours = list(inspect.signature(getattr(import_module(f"minilora.kernels.{name}"), launcher)).parameters)
        if definition is not torch.matmul:
            theirs = list(inspect.signature(definition).parameters)
            if theirs[0] == "self":  # the weight; and the kernel copies an adapter's columns on its way
                assert ours == ["weight", *theirs[1:], "columns"]
            else:
                assert ours == theirs
    for place in (f"tests/test_kernels_{name}.py", f"benchmarks/{name}.py"):
        assert (ROOT / place).is_file(), place
    assert f"| `{name}.py` |" in (ROOT / "kernels" / "README.md").read_text()


@pytest.mark.parametrize("name", OPERATIONS)
def test_fusion_of_products_and_sums_is_set(name: str) -> None:
    """Triton's default differs by version, and bits hang on it."""
    for launch in launches(ast.parse((ROOT / "kernels" / f"{name}.py").read_text())):
        assert "enable_fp_fusion" in {keyword.arg for keyword in launch.keywords}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_launch_is_on_the_tensors_gpu(name: str) -> None:
    """Triton launches on the current one."""
    tree = ast.parse((ROOT / "kernels" / f"{name}.py").read_text())
    withs = [node for node in ast.walk(tree) if isinstance(node, ast.With)]
    on = [node for node in withs if ast.unparse(node.items[0].context_expr).startswith("on(")]
    assert launches(tree)
    assert launches(tree) == [launch for node in on for launch in launches(node)]


@pytest.mark.parametrize("name", ["adamw", "norm", "rope", "softmax_gradient", "swiglu"])
def test_what_is_elementwise_is_the_kernel_s_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher of its name gets what the definition would, and the definition is not asked."""
    module = import_module(f"minilora.kernels.{name}")
    monkeypatch.setattr(dispatch, "has_kernels", lambda _: True)
    for launcher, definition in DEFINITIONS[name].items():
        monkeypatch.setattr(module, launcher, lambda *args, **kwargs: (args, kwargs))
        x = torch.ones(2)
        assert definition(x, 1, back=3) == ((x, 1), {"back": 3})


def launches(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
