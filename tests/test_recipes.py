"""Recipes: each is a whole configuration, fits the card that it names, and says what the set-up it repeats has."""

from pathlib import Path

import pytest

from minilora.arguments import parse_run, run_parser
from minilora.cli import main
from minilora.config import MISTRAL_7B, RunConfig
from minilora.errors import UserError
from minilora.recipes import recipe_file, recipe_names, summary
from minilora.verbs.training import train

GIB = 2**30
CARDS = {"t4-16gb": 15 * GIB, "12gb": 12 * GIB, "24gb": 24 * GIB, "80gb": 80 * GIB}


def config_of(name: str) -> RunConfig:
    return parse_run(run_parser(train), ["--recipe", name])[0]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_a_configuration(name: str) -> None:
    from minilora.train.ledger import predict_on_gpu

    config = config_of(name)
    assert len(summary(name)) > 20
    assert config.data.train == "", "the data are the user's"
    assert config.model.dtype != "auto", "what memory it needs depends on it"
    assert sum(predict_on_gpu(config, MISTRAL_7B).values()) < 80 * GIB


@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_fits_the_card_that_it_names(name: str) -> None:
    """With a tenth to spare, for the allocator's rounding and the driver."""
    from minilora.train.ledger import predict_on_gpu

    assert sum(predict_on_gpu(config_of(name), MISTRAL_7B).values()) < 0.9 * CARDS[name]


@pytest.mark.filterwarnings("ignore:--recipe")  # which of its keys the file overrides
def test_the_file_and_the_command_line_lie_over_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.toml").write_text("[lora]\nrank = 3\nalpha = 5\n")
    assert main(["train", "--recipe", "24gb", str(tmp_path / "my.toml"), "--lora.alpha", "7", "--print-config"]) == 0
    out = capsys.readouterr().out
    assert "rank = 3\n" in out
    assert "alpha = 7.0\n" in out
    assert "accumulate = 16\n" in out


def test_they_are_listed_with_their_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list-recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(" GB predicted" in line for line in lines)


def test_a_recipe_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no recipe 'h100'; there are 12gb, 24gb"):
        recipe_file("h100")
    assert main(["train", "--recipe", "../cli", "--print-config"]) == 2
    assert "no recipe" in capsys.readouterr().err
    assert main(["train", "--recipe"]) == 2


def test_published_figures() -> None:
    paper = config_of("qlora-paper")
    assert (paper.lora.rank, paper.lora.alpha, paper.lora.dropout, paper.train.max_steps) == (64, 16, 0.1, 1875)
    theirs = config_of("mistral-finetune")
    assert (theirs.lora.scale_of(""), theirs.train.lr, theirs.train.beta2) == (2.0, 6e-5, 0.95)
    assert theirs.data.max_seq_len == 32768
