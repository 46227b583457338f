"""The rule of the house (docs/architecture.md): imports point down, without circles, heavy ones only where they may.

Every import statement counts, those inside functions too; only `minilora/__init__.py`, whose names are loaded at their
first use, is left out.
"""

import ast
import subprocess
import sys
import tokenize
from functools import cache
from graphlib import TopologicalSorter
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    (
        *("errors", "compiled", "scratch", "ahead", "paging", "patterns", "config", "toml", "recipes"),
        *("dynamic_8bit", "nf4", "kv_cache"),
    ),
    ("kernels",),
    ("backend", "dispatch"),
    (
        *("norm", "rope", "swiglu", "visible", "attention"),
        *("softmax_gradient", "loss", "adamw", "linear", "lora", "projections", "neftune", "prefix"),
    ),
    ("model", "fused", "fast_block"),
    (
        *("memory", "memory_at_rest", "memory_of_step", "base", "hub"),
        *("decode_graph", "generation", "conversation", "tokenizer", "checkpoint", "data"),
    ),
    ("evaluate", "report", "chat"),
    ("train",),
    ("serve",),
    ("demo",),
    ("arguments", "verbs", "cli"),
    ("__main__",),
)
LAYER_OF = {part: depth for depth, parts in enumerate(LAYERS) for part in parts}
NEEDED_ANYWHERE = {"torch", "numpy", "sentencepiece"}
FOR_OUTPUT = {"rich", "matplotlib", "jsonargparse"}
MAY_OUTPUT = ("minilora.arguments", "minilora.verbs", "minilora.report", "minilora.train.progress")
ORACLES = {"transformers", "peft", "bitsandbytes", "accelerate", "mistral_common"}
OF_EXTRAS = {  # imported where they are used
    "minilora.hub": {"huggingface_hub"},
    "minilora.checkpoint.gguf_file": {"gguf"},
    "minilora.data.files": {"pyarrow"},
    "minilora.evaluate.metrics": {"sacrebleu", "rouge_score"},
    "minilora.serve.server": {"starlette", "uvicorn"},
}
MAX_LINES = 11_300
# What the README calls what trains, "some 4,000 lines".
READING_PATH = {
    *("config", "toml", "dynamic_8bit", "nf4", "backend", "dispatch", "compiled", "scratch", "ahead", "paging"),
    *("kv_cache", "norm", "rope", "swiglu", "visible", "attention", "softmax_gradient", "loss", "adamw"),
    *("linear", "lora", "model", "projections", "fused", "fast_block", "train"),
}
MAX_PATH_LINES = 4_150


def modules() -> dict[str, Path]:
    """Every module of the package by name; kernels/ lies beside minilora/ and is linked into it."""
    found = {}
    for folder, prefix in ((ROOT / "minilora", "minilora"), (ROOT / "kernels", "minilora.kernels")):
        for path in folder.rglob("*.py"):
            inside = path.relative_to(folder).with_suffix("").parts
            if prefix == "minilora" and inside[0] == "kernels":
                continue  # seen through the link
            found[".".join((prefix, *inside)).removesuffix(".__init__")] = path
    return found


MODULES = modules()
CHECKED = sorted(MODULES.keys() - {"minilora"})


@cache
def imported(name: str) -> frozenset[str]:
    """Dotted names of all that a module imports: a module where it is one, else the module it is taken from."""
    found = set[str]()
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: write the whole name, minilora.x"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES or node.module == "minilora" else str(node.module))
    return frozenset(found)


def ours(name: str) -> set[str]:
    return {target for target in imported(name) if target.split(".")[0] == "minilora"}


def layer(name: str) -> int:
    return LAYER_OF[name.split(".")[1]]


@pytest.mark.parametrize("name", CHECKED)
def test_the_module_has_a_layer(name: str) -> None:
    assert name.split(".")[1] in LAYER_OF, f"say in tests/test_imports.py and docs/architecture.md where {name} belongs"


@pytest.mark.parametrize("name", CHECKED)
def test_imports_point_down(name: str) -> None:
    for target in ours(name):
        assert target in MODULES, f"{name} imports {target}, which is no module; name the module that defines it"
        assert layer(target) <= layer(name), f"{name} imports {target} from a higher layer"


def test_there_are_no_circles() -> None:
    """Neither between modules, nor between the parts of the package that share a layer."""
    TopologicalSorter({name: ours(name) for name in CHECKED}).prepare()
    between_parts: dict[str, set[str]] = {}
    for name in CHECKED:
        part = name.split(".")[1]
        between_parts.setdefault(part, set()).update({t.split(".")[1] for t in ours(name)} - {part})
    TopologicalSorter(between_parts).prepare()


@pytest.mark.parametrize("name", CHECKED)
def test_third_parties_stand_where_they_may(name: str) -> None:
    allowed = set(NEEDED_ANYWHERE)
    if name.startswith(MAY_OUTPUT):
        allowed |= FOR_OUTPUT
    if name.startswith("minilora.kernels."):
        allowed |= {"triton"}
    allowed |= OF_EXTRAS.get(name, set())
    third_parties = {target.split(".")[0] for target in imported(name)} - sys.stdlib_module_names - {"minilora"}
    assert third_parties <= allowed


def test_the_package_knows_no_oracle() -> None:
    """Also not by a name that importlib is given, which the syntax tree would not show."""
    for name, path in MODULES.items():
        assert not {target.split(".")[0] for target in imported(name)} & ORACLES
        source = path.read_text("utf-8")
        for oracle in ORACLES:
            assert f'import_module("{oracle}' not in source, name
            assert f'__import__("{oracle}' not in source, name


def run(code: str) -> str:
    """What the code prints in a fresh interpreter; warnings there are errors too."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_minilora_imports_no_torch() -> None:
    heavy = run(
        "import minilora, minilora.config, sys; print(sorted({'torch', 'numpy', 'triton'} & sys.modules.keys()))"
    )
    assert heavy.strip() == "[]"


def test_every_public_name_is_there() -> None:
    assert "done" in run("import minilora; [getattr(minilora, name) for name in minilora.__all__]; print('done')")
    assert "True" in run("import minilora; print(set(minilora.__all__) == set(dir(minilora)))")
    assert "refused" in run("import minilora\ntry: minilora.nonsense\nexcept AttributeError: print('refused')")


def test_what_computes_also_runs_where_no_output_library_is_installed() -> None:
    names = [n for n in CHECKED if not n.startswith((*MAY_OUTPUT, "minilora.kernels", "minilora.__main__"))]
    names = [n for n in names if layer(n) < LAYER_OF["train"]]
    absent = sorted(FOR_OUTPUT | ORACLES)
    block = f"import importlib, sys; sys.modules.update(dict.fromkeys({absent}))"
    run(f"{block}\nfor name in {names}: importlib.import_module(name)")


def code_lines(source: str) -> int:
    """Without blank lines, comments and docstrings: an explanation is no length that has to be read."""
    strings = set[int]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings |= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(StringIO(source).readline) if t.type not in nothing]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - strings)


def test_the_package_stays_short_enough_to_be_read() -> None:
    """Without the kernels, which have a folder, a reading path and a README of their own."""
    own = {name: path for name, path in MODULES.items() if not name.startswith("minilora.kernels.")}
    lines = {name: code_lines(path.read_text("utf-8")) for name, path in own.items()}
    assert sum(lines.values()) < MAX_LINES, sorted(lines.items(), key=lambda item: -item[1])[:10]
    path = {name: n for name, n in lines.items() if name != "minilora" and name.split(".")[1] in READING_PATH}
    assert {name.split(".")[1] for name in path} == READING_PATH
    assert MAX_PATH_LINES - 200 < sum(path.values()) < MAX_PATH_LINES, "README.md and docs/architecture.md say how many"
