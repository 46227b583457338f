"""A run that was made by `minilora train`, for the verbs that use one."""

import re
from pathlib import Path

import pytest
from tiny_runs import MakeConfig, Run

from minilora.toml import config_toml


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"root": tmp_path_factory.mktemp("trained")}


@pytest.fixture
def finished(trained: dict[str, Path], make_config: MakeConfig, run: Run) -> Path:
    """The folder of a finished run, made once by `minilora train`. Do not change it."""
    if "run" not in trained:
        folder = trained["root"] / "run"
        toml = folder.with_suffix(".toml")
        toml.write_text(config_toml(make_config(train__output=str(folder), train__max_steps=12, train__lr=2e-2)))
        status, out, err = run("train", toml)
        assert (status, err) == (0, "")
        assert re.search(r"^before +loss .*\nafter +loss ", out, re.MULTILINE), out
        assert re.search(r"done: all steps done; report in .*report.html", out), out
        trained["run"] = folder
    return trained["run"]
