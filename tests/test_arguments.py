"""What the verbs are told: wrong keys, values and files are one line in words of ours, and the rest is understood."""

import json
import tomllib
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from tiny_runs import Run, chat, refused, write_jsonl

from minilora import arguments
from minilora.arguments import quoted
from minilora.cli import VERBS
from minilora.config import RunConfig, to_dict
from minilora.errors import UserError


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_flag(run: Run, verb: str, toml: Path) -> None:
    two, one = ["a", "b"], {"train": toml, "evaluate": "f", "generate": "p", "verify": "kernels", "data": "check"}
    needed = {"merge": two, "quantize": two}.get(verb, [one[verb]] if verb in one else [])
    refused(run(verb, *needed, "--nonsense", "3"), 2, f"minilora {verb}:", "nonsense", "--help")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora.rnak", "3"], ["lora.rnak"]),
        (["--lora.rank", "many"], ["rank"]),
        (["--train.strategy", "magic"], ["strategy", "qlora"]),
        (["--train.lr"], ["lr"]),
        (["--train.lr", "1" + "0" * 400], ["int too large to convert to float"]),
        (["--lora.rank", "0"], ["lora.rank is 0"]),
        (["--train.seed", "-1"], ["train.seed is -1"]),
        (["--train.seed", str(2**63)], ["train.seed is 9223372036854775808"]),
        (["--train.lr", "-1"], ["train.lr is -1"]),
        (["--model.device", "gpu"], ["model.device is 'gpu'", "cuda:N"]),
        (["--data.max_seq_len", "1"], ["data.max_seq_len is 1"]),
        (["--train.reinit", "top:x"], ["train.reinit is 'top:x'"]),
    ],
)
def test_a_wrong_flag_of_train(run: Run, toml: Path, flags: list[str], words: list[str]) -> None:
    """Whether a type refuses the value or a key's range."""
    refused(run("train", toml, *flags), 2, *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train.strategy", "full", "--model.quantize", "nf4"], ["train.strategy", "model.quantize"]),
        (["--train.strategy", "full", "--lora.dora", "true"], ["lora.dora is for lora and qlora"]),
        (["--train.strategy", "partial"], ["needs train.layers"]),
        (["--train.output="], ["train.output is empty"]),
    ],
)
def test_what_a_file_may_have_said_is_no_wrong_usage(run: Run, toml: Path, flags: list[str], words: list[str]) -> None:
    """Of keys that do not go together; without a file it is."""
    refused(run("train", toml, *flags), 1, *words)
    refused(run("train", *flags), 2, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[lora]\nrnak = 3\n", ["rnak"]),
        ("[lroa]\nrank = 3\n", ["lroa"]),
        ("rank = 3\n", ["rank"]),
        ('[lora]\nrank = "many"\n', ["rank"]),
        ("[lora]\nrank = 0\n", ["lora.rank is 0"]),
        ("[lora\n", []),
        ("[lora]\nrank = 3\nrank = 4\n", []),
        ("\x00", []),
        ("x = " + "[" * 100_000, ["recursion"]),
        (f"[train]\nlr = 1{'0' * 400}\n", ["int too large to convert to float"]),
    ],
)
def test_a_wrong_file_is_named_with_its_key(run: Run, tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    refused(run("train", path), 1, "wrong.toml", *words)


NUMBER, LIST = "but must be a whole number", "but must be a list such as [a,b]"
NO_KEY = "there is no key"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "--train.max_steps", "x"], f"train.max_steps is x, {NUMBER}"),
        (["train", "--train.lr", "abc"], "train.lr is abc, but must be a number"),
        (["train", "--eval.every", "1.5"], f"eval.every is 1.5, {NUMBER}"),
        (["train", "--train.strategy", "lra"], "train.strategy is lra, but must be one of 'qlora', 'lora',"),
        (["train", "--train.paged", "maybe"], "train.paged is maybe, but must be true or false"),
        (["train", "--eval.metrics", "f1"], f"eval.metrics is f1, {LIST}"),
        (["train", "--lora.rank_pattern", "3"], 'lora.rank_pattern is 3, but must be a table such as {"a":1}'),
        (["train", "--model", "x"], "model is a section, and 'x' no TOML file of it; name a key, as in --model.KEY"),
        (["generate", "hi", "--max_new_tokens", "0"], "max_new_tokens is 0, but must be >0"),
        (["generate", "hi", "--max_new_tokens", "x"], f"max_new_tokens is 'x', {NUMBER}"),
        (["generate", "hi", "--temperature", "x"], "temperature is 'x', but must be a number"),
        (["generate", "hi", "--top_p", "2"], "top_p is 2, but must be >0 and <=1"),
        (["generate", "hi", "--seed", "-1"], f"seed is -1, but must be >=0 and <{2**63}"),
        (["verify", "resume", "--steps", "1"], "steps is 1, but must be >=2 and <2147483648"),
        (["explain", "--weights", "[1,a]"], f"weights is [1,a], {LIST}"),
    ],
)
def test_a_value_of_another_type_is_told_in_words_of_ours(run: Run, args: list[str], words: str) -> None:
    got = run(*args)
    refused(got, 2)
    verb = " ".join(args[: 2 if args[0] == "verify" else 1])
    assert got[2].startswith(f"minilora {verb}: {words}")
    assert got[2].endswith(f"; see minilora {verb} --help\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[train]\nmax_steps = "x"\n', f"train.max_steps is x, {NUMBER}"),
        ("[train]\nlr = true\n", "train.lr is True, but must be a number"),
        ('[data]\ntrain = ["a:2", 3]\n', f"data.train is ['a:2', 3], {LIST} or text"),
        ("[model]\npath = 3\n", "model.path is 3, but must be text"),
        ('[data]\ntrain = "[a:2, b"\n', "data.train is [a:2, b, but a list must end with ]"),
        ("[train]\nmax_step = 3\n", f"{NO_KEY} train.max_step; did you mean train.max_steps?"),
        ("[train]\nmax-steps = 3\n", f"{NO_KEY} train.max-steps; did you mean train.max_steps?"),
        ("[trian]\nx = 3\n", f"{NO_KEY} trian.x"),
        ("[trian]\nmax_steps = 3\n", f"{NO_KEY} trian.max_steps; did you mean train.max_steps?"),
        ("[lora.rank_patern]\na = 3\n", f"{NO_KEY} lora.rank_patern.a; did you mean lora.rank_pattern?"),
        ("[zoo]\nelephants = 3\n", f"{NO_KEY} zoo.elephants"),
    ],
)
def test_in_a_file_too(run: Run, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    assert run("train", path) == (1, "", f"minilora train: {path}: {words}\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('rank = "x"\n', f"lora.rank is x, {NUMBER}"),
        ("rank = 0\n", "lora.rank is 0"),
        ("rnk = 3\n", f"{NO_KEY} lora.rnk; did you mean lora.rank?"),
        ("[lora]\nrank = 3\n", f"{NO_KEY} lora.lora.rank"),
        ("rank = \n", "Invalid value"),
    ],
)
def test_so_in_a_section_s_own_file(run: Run, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "lora.toml"
    path.write_text(text)
    for args in (["--lora", path], [f"--lora={path}"]):
        refused(run("train", *args), 1, f"minilora train: {path}: {words}")
    refused(run("train", "--lora", tmp_path / "none.toml"), 2, "lora is a section, and ")
    path.rename(other := tmp_path / "lora")  # whatever its name
    no_toml = "no TOML file; name a key, as in --lora.KEY"
    refused(run("train", "--lora", other), 1, f"{other}: {no_toml if words == 'Invalid value' else words}")
    refused(run("generate", "--train", other, "hi"), 2, "there is no --train")
    other.write_bytes(b"\xff")
    refused(run("train", "--lora", other), 1, f"{other}: {no_toml}")

    path.write_text("rank = 3\n")
    status, out, _ = run("train", "--lora", path, "--print-config")
    assert (status, tomllib.loads(out)["lora"]["rank"]) == (0, 3)


def test_a_large_file_is_known_for_no_configuration_unread(run: Run, tmp_path: Path) -> None:
    with (large := tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(1 << 40)
    refused(run("train", "--model", large), 1, f"{large}: no TOML file; name a key, as in --model.KEY")
    refused(run("train", large), 1, f"{large}: no TOML file; data go to --data.train")


def test_options_are_spelled_with_hyphens_or_underscores(run: Run, toml: Path) -> None:
    expected = run("train", toml, "--eval.max_new_tokens", 3, "--print-config")
    assert expected[0] == 0
    assert run("train", "--print_config", toml, "--eval.max-new-tokens", 3) == expected
    assert run("train", toml, "--eval.max-new-tokens=3", "--print_config") == expected
    refused(run("generate", "hi", "--max-new-tokens", 0), 2, "max_new_tokens is 0")
    refused(run("merge", "a", "--audit-tokens=0"), 2, "audit_tokens is 0")
    refused(run("train", "--list_recipes", "--no-such_thing"), 2, "--no-such_thing")


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_missing_is_called_as_in_the_usage(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a name of its own, in capital letters, or by the choices there are."""

    def look(parser: ArgumentParser, *_: object, **__: object) -> None:
        words = [action for action in parser._actions if not action.option_strings and not action.choices]
        assert [action.metavar for action in words] in ([action.dest.upper() for action in words], ["FILE"])
        raise UserError("seen enough")

    monkeypatch.setattr(arguments, "parse", look)
    with pytest.raises(UserError, match="seen enough"):
        VERBS[verb]([])


def test_lists_of_compare_may_stand_in_brackets(run: Run, toml: Path) -> None:
    for given in ("full,x", "[full,x]", "[full, x]", "full, x"):
        refused(run("compare", toml, "--strategies", given), 2, "there is no strategy 'x' to compare")


def test_config_as_an_option_is_the_word_after_the_verb(run: Run, toml: Path, chats: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[lora]\nrnak = 3\n")
    for given in (["--config", wrong], [f"--config={wrong}"]):
        for verb in (["train"], ["compare"], ["data", "check", chats]):
            refused(run(*verb, *given), 1, "wrong.toml", "rnak")
    refused(run("data", "check", "--config", tmp_path / "no.toml"), 1, "no.toml: no such file")
    refused(run("train", "--config"), 2, "--config")
    expected = run("train", toml, "--lora.rank", 7, "--print-config")
    assert run("train", "--lora.rank", 7, "--config", toml, "--print-config") == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--lora.targets", "[q_proj, v_proj]"], ["--lora.targets", '["q_proj", "v_proj"]']),
        (["--lora.targets=[q_proj]"], ['--lora.targets=["q_proj"]']),
        (["--explain.weights", "[1,-2.5]"], ["--explain.weights", "[1,-2.5]"]),
        (['["q_proj"]'], ['["q_proj"]']),
        (["[INST]"], ["[INST]"]),
        (["--raw", "[INST]"], ["--raw", "[INST]"]),
        (["--model.dtype=float32", "[INST]"], ["--model.dtype=float32", "[INST]"]),
    ],
)
def test_a_list_of_words_needs_no_quotes_and_a_prompt_gets_none(given: list[str], expected: list[str]) -> None:
    assert quoted(given) == expected


def test_the_file_need_not_be_the_first_word(run: Run, toml: Path, tmp_path: Path) -> None:
    expected = run("train", toml, "--lora.rank", 7, "--print-config")
    assert run("train", "--print-config", toml, "--lora.rank", 7) == expected
    assert run("train", "--lora.rank", 7, "--print-config", toml) == expected
    assert run("train", "--lora.rank=7", "--print-config", toml) == expected
    refused(run("train", "--resume", toml), 1, "no run to resume here")
    refused(run("train", "--overwrite", tmp_path / "no.toml"), 1, "no.toml: no such file")
    refused(run("train", toml, "--dry-run", toml), 2, "unrecognized")


def test_every_recipe_that_is_named_counts(run: Run) -> None:
    refused(run("train", "--recipe", "24gb", "--recipe", "nonsense", "--print-config"), 2, "nonsense")


def test_a_missing_file_says_how_to_get_one(run: Run, tmp_path: Path) -> None:
    refused(run("train", tmp_path / "no.toml"), 1, "no.toml: no such file", "--print-config")
    refused(run("evaluate", tmp_path / "no.jsonl", "--model.path", tmp_path), 1, str(tmp_path))


def test_what_is_no_toml_file_is_told(run: Run, chats: Path, tmp_path: Path) -> None:
    refused(run("train", tmp_path), 1, f"{tmp_path}: a folder; name a TOML file\n")
    refused(run("train", chats), 1, f"{chats}: no TOML file; data go to --data.train\n")
    (tmp_path / "x.parquet").write_bytes(b"PAR1\xff")
    refused(run("compare", "--config", tmp_path / "x.parquet"), 1, "x.parquet: no TOML file; data go to --data.train\n")


def test_an_unknown_option_comes_with_the_nearest(run: Run) -> None:
    for given, words in {
        ("train", "--train.max-step", "3"): "--train.max-step; did you mean --train.max_steps?",
        ("generate", "hi", "--adaptr=x"): "--adaptr; did you mean --adapter?",
        ("chat", "--elephants"): "--elephants",
        ("train", "--dry", "x.toml"): "--dry; did you mean --dry-run?",  # a file would be taken for its value
    }.items():
        told = f"minilora {given[0]}: there is no {words}; see minilora {given[0]} --help\n"
        assert run(*given) == (2, "", told)


@pytest.mark.filterwarnings("default")
def test_what_a_file_overrides_of_a_recipe_is_told(run: Run, toml: Path, tmp_path: Path) -> None:
    some = tmp_path / "some.toml"
    some.write_text("[train]\nlr = 1e-3\nmax_steps = 4\n[lora]\nrank = 3\n")
    said = "warning: --recipe 24gb: the file overrides"
    assert run("train", "--recipe", "24gb", toml, "--print-config")[2] == f"{said} all that it sets\n"
    assert run("train", some, "--recipe", "24gb", "--print-config")[2] == f"{said} lora.rank, train.lr\n"
    some.write_text("[train]\nmax_steps = 4\n")
    assert run("train", some, "--recipe", "24gb", "--print-config", "--train.lr", 1)[2] == ""


def test_the_printed_configuration_is_complete_and_reads_back(run: Run, tmp_path: Path) -> None:
    flag = "--print-config"
    status, out, err = run("train", flag)
    assert status == 0, err
    assert tomllib.loads(out) == to_dict(RunConfig())
    path = tmp_path / "printed.toml"
    path.write_text(out)
    status, again, err = run("train", path, flag)
    assert (status, again) == (0, out), err


def test_flags_win_over_the_file_and_are_printed(run: Run, toml: Path) -> None:
    status, out, _ = run("train", toml, "--train.lr", "0.5", "--lora.targets", '["q_proj"]', "--print-config")
    assert status == 0
    printed = tomllib.loads(out)
    assert (printed["train"]["lr"], printed["lora"]["targets"], printed["train"]["max_steps"]) == (0.5, ["q_proj"], 4)


def test_several_sources_on_the_command_line_and_in_the_file(run: Run, toml: Path, chats: Path, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [chat("emit", "it")])
    both = [f"{chats}:2", str(other)]
    for given in (f"[{chats}:2, {other}]", json.dumps(both)):
        status, out, err = run("train", toml, "--data.train", given, "--print-config")
        assert (status, err) == (0, "")
        assert tomllib.loads(out)["data"]["train"] == both
    toml.write_text(out)
    assert run("train", toml, "--print-config")[1] == out, "what was printed says the same again"
    assert run("train", toml, "--data.validation", other, "--data.train", f"[{chats}:2]")[0] == 0
    refused(
        run("train", toml, "--overwrite", "--data.train", f"{chats}:0"), 1, "chats.jsonl:0: the weight of a source is 0"
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.validation_share", "1"], ["data.validation_share is 1.0"]),
        (["--data.test_share", "-0.1"], ["data.test_share is -0.1"]),
        (["--data.test", "f", "--data.test_share", "0.1"], ["data.test and data.test_share both"]),
        (["--data.replay", "1"], ["data.replay is 1.0"]),
        (["--data.replay", "0.1"], ["name data.replay_from"]),
        (["--data.share", "0"], ["data.share is 0.0"]),
        (["--data.share", "1.5"], ["data.share is 1.5"]),
        (["--data.split_seed", "-1"], ["data.split_seed is -1"]),
        (["--data.train", "[a, ]"], ["data.train holds an empty name"]),
        (["--data.too_long", "cut"], ["too_long"]),
    ],
)
def test_data_keys_out_of_range(run: Run, toml: Path, flags: list[str], words: list[str]) -> None:
    got = run("train", toml, "--data.validation", "v", *flags)
    refused(got, got[0], *words)
    assert got[0] in (1, 2)
