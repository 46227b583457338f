"""Models by their name on the hub: a server of our own that speaks its protocol, and huggingface_hub as it is."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest

from minilora.checkpoint.save import save_hf
from minilora.cli import main
from minilora.config import ModelConfig, base_folder
from minilora.errors import UserError
from minilora.hub import hub_name, local_folder
from minilora.model import Mistral

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own
OLD, NEW = "a" * 40, "b" * 40


class Hub:
    """The revisions of one model, org/tiny, each a dictionary of files; what was asked for is noted."""

    def __init__(self) -> None:
        demo = {f.name: f.read_bytes() for f in base_folder("demo").iterdir() if f.is_file()}
        extra = {
            "consolidated.safetensors": b"twice",
            "params.json": b"{}",
            "pytorch_model.bin": b"x",
            "README.md": b"#",
        }
        newer = {"generation_config.json": b"{}\n", "added_tokens.json": b"{ }", "chat_template.jinja": b"[INST]"}
        self.commits = {OLD: demo | extra, NEW: demo | extra | newer}
        self.names = {"main": NEW, "v1": OLD, OLD: OLD, NEW: NEW}
        self.asked: list[str] = []
        self.status = 200
        self.cut_after: int | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                outer.answer(self, body=False)

            def do_GET(self) -> None:
                outer.answer(self, body=True)

            def log_message(self, *_args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.partition("?")[0]
        parts = path.strip("/").split("/")
        self.asked.append(f"{request.command} {path} {request.headers.get('Range', '')}".strip())
        if self.status != 200:
            code = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}[self.status]
            return self.send(request, self.status, b"{}", {"X-Error-Code": code})
        if parts[:4] == ["api", "models", "org", "tiny"]:
            revision = parts[5] if len(parts) > 5 else "main"
            if revision not in self.names:
                return self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            files = self.commits[self.names[revision]]
            if "tree" in parts:
                tree = [{"type": "file", "path": n, "oid": _etag(d), "size": len(d)} for n, d in files.items()]
                return self.send(request, 200, json.dumps(tree).encode(), {})
            about = {"id": "org/tiny", "sha": self.names[revision], "siblings": [{"rfilename": n} for n in files]}
            return self.send(request, 200, json.dumps(about).encode(), {})
        if parts[:3] == ["org", "tiny", "resolve"]:
            commit = self.names[parts[3]]
            data = self.commits[commit].get("/".join(parts[4:]))
            if data is not None:
                headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
                return self.send_file(request, data, headers, body)
        return self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def send_file(self, request: BaseHTTPRequestHandler, data: bytes, headers: dict[str, str], body: bool) -> None:
        start = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        part = data[start:]
        request.send_response(206 if start else 200)
        for key, value in {**headers, "Content-Length": str(len(part))}.items():
            request.send_header(key, value)
        request.end_headers()
        if body and self.cut_after is not None and len(part) > self.cut_after:
            request.wfile.write(part[: self.cut_after])
            request.close_connection = True
        elif body:
            request.wfile.write(part)

    def send(self, request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(data))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(data)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.server.shutdown()
    made.server.server_close()


def settings(hub: Hub, cwd: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(cwd / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}


def in_a_process(hub: Hub, cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    env, command = os.environ | settings(hub, cwd) | {"PYTHONPATH": path}, [sys.executable, "-m", "minilora", *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


def minilora(hub: Hub, cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """The same here, with a huggingface_hub of its own, which reads its settings when it is imported."""
    kept, (out, err) = taken_out("huggingface_hub"), (StringIO(), StringIO())
    try:
        with patch.dict(os.environ, settings(hub, cwd)), chdir(cwd), redirect_stdout(out), redirect_stderr(err):
            status = main([*args])
    finally:
        taken_out("huggingface_hub")
        sys.modules |= kept
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


def taken_out(library: str) -> dict[str, ModuleType]:
    """Its modules, which are no longer imported."""
    return {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == library}


def files_of(hub: Hub) -> set[str]:
    """The files that were fetched."""
    return {line.split("/")[-1].split()[0] for line in hub.asked if line.startswith("GET /org/tiny/resolve")}


def test_a_name_is_fetched_once_and_found_again_without_a_connection(hub: Hub, tmp_path: Path) -> None:
    args = ("explain", "--model.path", "org/tiny", "--tensor", "norm.weight")
    done = in_a_process(hub, tmp_path, *args)
    assert done.returncode == 0, done.stderr
    assert files_of(hub) == {
        "README.md",
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
    }
    assert re.search(r"100%.*\| 7/7 ", done.stderr), "a bar shows how it goes"
    assert len(list((tmp_path / "cache").rglob("snapshots/*"))) == 1
    hub.asked.clear()
    assert minilora(hub, tmp_path, *args).returncode == 0
    assert not files_of(hub)
    hub.server.shutdown()
    hub.server.server_close()
    assert minilora(hub, tmp_path, *args).stdout == done.stdout
    shutil.rmtree(tmp_path / "cache")
    refused = minilora(hub, tmp_path, *args)
    assert refused.returncode == 1
    assert "org/tiny: no such folder, the hub cannot be reached, and its cache here does not" in refused.stderr


def test_a_revision_may_be_named(hub: Hub, tmp_path: Path) -> None:
    for name in ("v1", OLD):
        done = minilora(hub, tmp_path, "explain", "--model.path", f"org/tiny@{name}", "--tensor", "norm.weight")
        assert done.returncode == 0, done.stderr
    (snapshot,) = (tmp_path / "cache").rglob("snapshots/*")
    assert snapshot.name == OLD
    refused = minilora(hub, tmp_path, "explain", "--model.path", "org/tiny@v9", "--tensor", "norm.weight")
    assert refused.stderr.count("\n") == 1
    assert "org/tiny: the hub's model has no revision v9" in refused.stderr


def test_a_run_pins_the_revision_and_writes_it_down(hub: Hub, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "red"}\n' * 4)
    args = ["train", "--model.path", "org/tiny", "--data.train", str(text), "--train.max_steps", "1"]
    quick = ["--train.output", "run", "--data.max_seq_len", "16", "--eval.samples", "0", "--eval.answers", "0"]
    done = minilora(hub, tmp_path, *args, *quick)
    assert done.returncode == 0, done.stderr
    assert f'path = "org/tiny@{NEW}"' in (tmp_path / "run" / "config.toml").read_text()
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "minilora.json").read_text())["base_path"] == f"org/tiny@{NEW}"
    for_peft = json.loads((adapter / "adapter_config.json").read_text())
    assert (for_peft["base_model_name_or_path"], for_peft["revision"]) == ("org/tiny", NEW)
    hub.names["main"] = OLD  # what main is now is no matter to an adapter that was trained on what it was
    answered = minilora(hub, tmp_path, "generate", "--adapter", "run/adapter", "red", "--max_new_tokens", "2")
    assert answered.returncode == 0, answered.stderr
    assert [s.name for s in (tmp_path / "cache").rglob("snapshots/*")] == [NEW]


def test_a_fetch_that_was_cut_off_goes_on(hub: Hub, tmp_path: Path) -> None:
    """What has come is kept in pieces of 10 MB; of a file of three of them each connection brings one and a half."""
    sizes = ModelConfig(dim=256, n_layers=1, head_dim=64, hidden_dim=256, n_heads=4, n_kv_heads=4, vocab_size=27_000)
    model = Mistral(sizes)
    model.init_weights(0)
    save_hf(model, tmp_path / "large")
    hub.commits[NEW] = {file.name: file.read_bytes() for file in (tmp_path / "large").iterdir()}
    hub.cut_after = 15_000_000
    done = minilora(hub, tmp_path, "explain", "--model.path", "org/tiny", "--tensor", "norm.weight")
    assert done.returncode == 0, done.stderr
    fetches = [line for line in hub.asked if line.startswith("GET") and "model.safetensors" in line]
    assert [int(line.partition("bytes=")[2].rstrip("-") or 0) > 0 for line in fetches] == [False, True, True], fetches


def test_of_a_tokenizer_s_name_the_weights_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "red"}\n')
    given = ["--model.path", str(base_folder("demo")), "--model.tokenizer", "org/tiny", "--eval.answers", "0"]
    done = minilora(hub, tmp_path, "evaluate", str(text), *given)
    assert done.returncode == 0, done.stderr
    assert files_of(hub) == {"added_tokens.json", "chat_template.jinja", "tokenizer.model"}


def test_what_a_model_learnt_is_known_of_one_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    """Its minilora.json comes along: it says which template was trained with."""
    hub.commits[NEW] = hub.commits[NEW] | {
        "minilora.json": b'{"format_version": 2, "tokenizer": {"template": "v1-hf"}}'
    }
    done = minilora(hub, tmp_path, "generate", "red", "--model.path", "org/tiny", "--max_new_tokens", "1")
    assert "minilora.json" in files_of(hub)
    assert "old_hf_spaces is a rule of v1 tokenizers, and this one is v3" in done.stderr


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "no such model on the hub"), (404, "no such model on the hub"), (403, "accepted its terms")],
)
def test_what_the_hub_refuses_is_one_line(hub: Hub, tmp_path: Path, status: int, message: str) -> None:
    hub.status = status
    done = minilora(hub, tmp_path, "explain", "--model.path", "org/tiny", "--tensor", "norm.weight")
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_the_library_a_name_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minilora.errors.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"org/tiny: no such folder; .* needs huggingface_hub.*'minilora\[hub\]'"):
        local_folder("org/tiny")


def test_what_is_a_name_and_what_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_name("org/tiny") == ("org/tiny", None)
    assert hub_name("org/tiny@v1") == ("org/tiny", "v1")
    assert hub_name("org/Tiny-7B-v0.3@refs/pr/1") == ("org/Tiny-7B-v0.3", "refs/pr/1")
    folders = (
        "demo",
        "runs",
        "./a/b",
        "../b",
        "/a/b",
        "~/b",
        "a/b/c",
        "a/",
        "/b",
        "",
        ".cache/b",
        "a/..",
        "a/b@",
        "a b/c",
        "é/b",  # which the hub has no names like
    )
    assert not any(map(hub_name, folders))
    Path("org/tiny").mkdir(parents=True)
    assert not hub_name("org/tiny")
    assert not hub_name(Path("org/other"))
    assert hub_name("org/" + "x" * 5000)  # and no error of the file system's
