"""Comparing: which runs there are, real ones in processes of their own, the rank, and the one look at the test."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import torch
from sentencepiece import sentencepiece_model_pb2
from tiny_runs import TOKENIZER, MakeConfig, Run, refused, tiny_model, write_jsonl

from minilora.arguments import parse_run, run_parser
from minilora.checkpoint.quantize import quantize_checkpoint
from minilora.checkpoint.save import save_hf
from minilora.cli import main
from minilora.config import RunConfig
from minilora.errors import UserError
from minilora.toml import config_toml
from minilora.train import compare as compare_module
from minilora.train.compare import STRATEGIES, Configured, Variant, all_variants, combinations, compare
from minilora.train.run_folder import LOCK, hold
from minilora.verbs.training import compare as compare_verb


def names(*arguments: object) -> list[str]:
    return [name for name, _ in combinations(*arguments)]  # type: ignore[arg-type]


def test_every_strategy_meets_every_value_and_a_curve_is_drawn_at_the_first() -> None:
    made = dict(combinations(["lora", "full"], ["data.replay=0,0.2"], ["0.5"], 1e-2))
    assert list(made) == [
        "lora-replay=0", "lora-replay=0-share=0.5", "lora-replay=0.2",
        "full-replay=0", "full-replay=0-share=0.5", "full-replay=0.2",
    ]  # fmt: skip
    not_the_configuration_s = {"train.layers": "null", "train.parameters": "[]", "lora.dora": "false"}
    not_the_configuration_s |= {"model.quantize": "auto"}
    assert made["lora-replay=0.2"] == {"train.strategy": "lora", **not_the_configuration_s, "data.replay": "0.2"}
    assert made["full-replay=0-share=0.5"] == {
        "train.lr": "0.001", "train.strategy": "full", **not_the_configuration_s, "data.replay": "0",
        "data.share": "0.5",
    }  # fmt: skip


def test_help_names_the_strategies_and_what_they_do_to_the_learning_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ",".join(sorted(STRATEGIES)) == ",".join(
        sorted(said.partition("a list of ")[2].partition(";")[0].split(","))
    )
    factors = {name: factor for name, (_, factor) in STRATEGIES.items() if factor != 1}
    assert factors == {"full": 0.1, "prefix": 100.0}
    assert "full takes a tenth of adapters' train.lr, prefix a hundred times as much" in said
    assert "partial takes train.layers 2, unless the configuration is of partial itself" in said


def test_a_grid_alone_and_a_grid_of_two_keys() -> None:
    assert names([], ["train.lr=1e-4,2e-4"], [], 1.0) == ["lr=1e-4", "lr=2e-4"]
    assert len(names([], ["train.lr=1,2", "lora.rank=4,8,16"], [], 1.0)) == 6
    assert names([], [], [], 1.0) == ["run"]
    assert names([], ["train.lr=1e-4, 2e-4"], [], 1.0) == ["lr=1e-4", "lr=2e-4"]
    assert names([], ["model.path=a/b,c/b"], [], 1.0) == ["path=a_b", "path=c_b"]  # each is a folder


def test_a_value_of_the_grid_goes_before_the_strategy_s_own() -> None:
    assert dict(combinations(["full"], ["train.lr=7e-4"], [], 1e-2))["full-lr=7e-4"]["train.lr"] == "7e-4"


def test_a_key_stands_in_one_grid_and_folders_in_none() -> None:
    with pytest.raises(UserError, match=r"--grid train\.lr=3,4: twice"):
        names([], ["train.lr=1,2", "train.lr=3,4"], [], 1.0)
    with pytest.raises(UserError, match="folders go by --output"):
        names([], ["train.output=a,b"], [], 1.0)


def test_the_run_s_own_folder_is_not_named(make_config: MakeConfig, tmp_path: Path, run: Run) -> None:
    (tmp_path / "run.toml").write_text(config_toml(make_config()))
    for given in (["--train.output", tmp_path / "cmp"], [f"--train.output={tmp_path / 'cmp'}"]):
        status, _, err = run("compare", tmp_path / "run.toml", "--grid", "train.lr=x,y", *given)
        assert (status, err) == (2, "minilora compare: --train.output: folders go by --output; drop it\n")
    assert run("compare", "--train.outp", tmp_path)[0] == 2, "an option has one name"


def test_a_grid_varies_keys_of_a_configuration_and_none_of_the_verb_s_own_options() -> None:
    for key in ("strategies", "shares", "rank_by", "output", "grid", "lora", "train.learning_rate"):
        with pytest.raises(UserError, match=rf"--grid {key}=a,b: {key} is no key of a configuration"):
            names([], [f"{key}=a,b"], [], 1.0)
    assert names([], ["train.max-steps=3,4"], [], 1.0) == ["max_steps=3", "max_steps=4"]
    assert names([], ["recipe=12gb,24gb"], [], 1.0) == ["recipe=12gb", "recipe=24gb"]


def test_a_strategy_is_named_by_strategies_or_by_the_grid() -> None:
    with pytest.raises(UserError, match=r"--grid train\.strategy=full,qlora: --strategies names them; drop it"):
        names(["lora"], ["train.strategy=full,qlora"], [], 1.0)
    assert names([], ["train.strategy=full,qlora"], [], 1.0) == ["strategy=full", "strategy=qlora"]


def test_commas_in_brackets_are_a_value_s_own() -> None:
    made = combinations([], ["lora.targets=[q_proj,v_proj],[k_proj],all-linear"], [], 1.0)
    assert [changes["lora.targets"] for _, changes in made] == ["[q_proj,v_proj]", "[k_proj]", "all-linear"]
    made = combinations([], ['lora.rank_pattern={"q_proj":2,"k_proj":4},{}'], [], 1.0)
    assert [changes["lora.rank_pattern"] for _, changes in made] == ['{"q_proj":2,"k_proj":4}', "{}"]


def test_a_long_name_is_cut_to_what_a_file_may_be_called() -> None:
    short, *long = names([], [f"model.path=demo,{'é' * 300},{'é' * 300}x"], [], 1.0)
    assert short == "path=demo"
    assert long[0] != long[1]
    assert all(name.startswith("path=ééé") and len(name.encode()) <= 100 for name in long)


def test_the_same_run_twice_is_refused_before_one_is_trained(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(config_toml(make_config()))
    command = ["compare", str(tmp_path / "run.toml"), "--output", str(tmp_path / "out")]
    for twice in (["--grid", "train.lr=1e-4,1e-4"], ["--strategies", "lora,lora"]):
        assert main([*command, *twice]) == 2
        assert "two of the runs are" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def of_file(path: Path, config: RunConfig) -> Configured:
    """`all_variants`' configured, as of the verb that is given this file."""
    path.write_text(config_toml(config))
    parser = run_parser(compare_verb)
    return lambda changes: parse_run(parser, [str(path), *(f"--{k}={v}" for k, v in changes.items())])[0]


@pytest.mark.parametrize(
    ("own", "layers", "parameters"),
    [
        ({"train__strategy": "partial", "train__layers": 1, "train__parameters": ("lm_head",)}, 1, ("lm_head",)),
        ({"train__strategy": "partial", "train__parameters": ("lm_head",)}, None, ("lm_head",)),
        ({"lora__dora": True}, 2, ()),
    ],
)
def test_every_strategy_can_be_compared_from_a_configuration_of_another(
    make_config: MakeConfig, tmp_path: Path, own: dict[str, Any], layers: int | None, parameters: tuple[str, ...]
) -> None:
    """And of partial itself, which keeps what it says of the weights that learn."""
    configured = of_file(tmp_path / "run.toml", make_config(**own))
    made = {variant.name: variant.config for variant in all_variants(list(STRATEGIES), [], [], configured)}
    assert list(made) == list(STRATEGIES)
    assert {name for name, config in made.items() if config.lora.dora} == {"dora"}
    assert {name for name, config in made.items() if config.train.layers or config.train.parameters} == {"partial"}
    assert (made["partial"].train.layers, made["partial"].train.parameters) == (layers, parameters)


def test_a_learning_rate_is_meant_for_the_configuration_s_own_strategy() -> None:
    """Such as chatglm-ptuning's 2e-2, of a prefix."""
    for own, lr in (("qlora", 2e-4), ("lora", 2e-4), ("partial", 2e-4), ("full", 2e-5), ("prefix", 2e-2)):
        made = dict(combinations([*STRATEGIES], [], [], lr, own))
        rates = {name: float(changes.get("train.lr", lr)) for name, changes in made.items()}
        assert rates == pytest.approx(dict.fromkeys(STRATEGIES, 2e-4) | {"full": 2e-5, "prefix": 2e-2})
        assert "train.lr" not in made[own]
        assert dict(combinations([], [], [], lr, own)) == {"run": {}}


@pytest.mark.parametrize(
    "own", [{"model__quantize": "nf4"}, {"train__strategy": "lora", "model__quantize": "none"}], ids=["nf4", "none"]
)
def test_qlora_and_dora_have_their_base_in_nf4_and_the_others_a_plain_one(
    make_config: MakeConfig, tmp_path: Path, own: dict[str, Any]
) -> None:
    """Whatever the configuration says; a prefix alone goes by that."""
    configured = of_file(tmp_path / "run.toml", make_config(**own))
    made = all_variants([*STRATEGIES], [], [], configured)
    in_nf4 = {"qlora", "dora"} | ({"prefix"} if own["model__quantize"] == "nf4" else set())
    assert {variant.name for variant in made if variant.config.quantize} == in_nf4
    [own_way] = all_variants(["lora"], ["model.quantize=nf4"], [], configured)
    assert own_way.config.quantize, "as the grid says"


def test_runs_that_come_to_the_same_configuration_are_one(make_config: MakeConfig) -> None:
    config = make_config(train__strategy="qlora", data__share=1.0)

    def configured(changes: Mapping[str, str]) -> RunConfig:
        return replace(config, data=replace(config.data, share=float(changes.get("data.share", 1))))

    made = all_variants(["qlora"], [], ["0.5", "1", "1.0", ".5"], configured)
    assert [variant.name for variant in made] == ["qlora", "qlora-share=0.5"]


def test_resume_and_overwrite_contradict_each_other(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--resume goes on and --overwrite begins anew; give one of them"):
        compare(variants(make_config()), tmp_path / "out", pytest.fail, resume=True, overwrite=True)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch, run: Run) -> Callable[..., dict[str, RunConfig]]:
    """The runs on the demo's data that `minilora compare` would begin for such arguments, those on a share left out."""

    def would_run(*args: object) -> dict[str, RunConfig]:
        seen = list[Variant]()

        def stop(made: list[Variant], *_: object) -> None:
            seen.extend(made)
            raise UserError("seen enough")

        monkeypatch.setattr("minilora.train.compare.compare", stop)
        status, out, err = run("compare", *args)
        assert (status, err) == (1, "minilora compare: seen enough\n")
        assert "no data.train is named: what is not given is the demo's, its data too" in out
        assert all("chat_train.jsonl" in variant.config.data.train for variant in seen)
        return {variant.name: variant.config for variant in seen if "data.share" not in variant.changes}

    return would_run


def test_the_embedded_data_are_there_before_options_are_held_against_them(
    embedded: Callable[..., dict[str, RunConfig]],
) -> None:
    """Such as a share that is replayed, of what the demo's configuration names."""
    made = embedded("--data.replay", 0.3, "--grid", "train.seed=1,2")
    assert [config.data.replay for config in made.values()] == [0.3, 0.3]


@pytest.mark.parametrize("given", [["--data.replay", 0.3], ["--data.replay=0"], ["replay.toml"]])
def test_a_share_that_is_replayed_is_varied_only_where_none_is_given(
    embedded: Callable[..., dict[str, RunConfig]], tmp_path: Path, given: list[Any]
) -> None:
    (tmp_path / "replay.toml").write_text('[data]\nreplay = 0.3\nreplay_from = "lines.jsonl"\n')
    assert {config.data.replay for config in embedded("--strategies", "lora,full").values()} == {0, 0.2}
    made = embedded(*(tmp_path / word if word == "replay.toml" else word for word in given))
    assert list(made) == list(STRATEGIES)
    assert {config.data.replay for config in made.values()} == {0 if given == ["--data.replay=0"] else 0.3}


def test_a_file_of_print_config_whose_train_is_empty_names_no_data(
    embedded: Callable[..., dict[str, RunConfig]], tmp_path: Path, run: Run
) -> None:
    """Yet what it says of all else holds."""
    (tmp_path / "my.toml").write_text(run("train", "--print-config", "--lora.rank", 3)[1])
    assert {config.lora.rank for config in embedded(tmp_path / "my.toml").values()} == {3}


def test_what_is_no_grid_and_no_strategy() -> None:
    for grid in ("train.lr", "=1,2", "train.lr=1,,2", "train.lr="):
        with pytest.raises(UserError, match=r"--grid .*must be KEY=A,B"):
            names([], [grid], [], 1.0)
    with pytest.raises(UserError, match=f"no strategy 'dara'.*{', '.join(STRATEGIES)}"):
        names(["dara"], [], [], 1.0)


def variants(config: RunConfig) -> list[Variant]:
    """One that learns, one that hardly does, and one that fails: its data are not there."""
    slow = replace(config, train=replace(config.train, lr=1e-6))
    broken = replace(config, data=replace(config.data, train="/nowhere.jsonl"))
    named = {"slow": slow, "fast": config, "broken": broken}
    return [Variant(name, {"train.lr": str(c.train.lr)}, c) for name, c in named.items()]


@pytest.mark.slow
def test_runs_are_ranked_on_validation_and_the_best_alone_opens_the_test(
    make_config: MakeConfig, data_folder: Path, tmp_path: Path
) -> None:
    test_file = tmp_path / "test.jsonl"
    test_file.write_text("".join(reversed((data_folder / "validation.jsonl").read_text().splitlines(keepends=True))))
    config = make_config(data__test=str(test_file))
    said: list[str] = []
    result = compare(variants(config), tmp_path / "out", said.append)
    assert result["winner"] == "fast"
    assert result["test"]["loss"] > 0
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["fast"]["after"]["loss"] < rows["slow"]["after"]["loss"]
    assert "/nowhere.jsonl" in rows["broken"]["failed"]
    assert rows["fast"]["peak_memory_bytes"]["private"] > 0
    assert said[::2] == [
        f"{n} of 3  {name} ...  (its steps are in {tmp_path}/out/{name}.log)"
        for n, name in enumerate(("slow", "fast", "broken"), 1)
    ]
    assert [line.split(":")[0] for line in said[1::2]] == ["1 of 3  slow", "2 of 3  fast", "3 of 3  broken"]
    assert json.loads((tmp_path / "out/compare.json").read_text()) == json.loads(json.dumps(result))

    def summary(name: str) -> dict[str, object]:
        document: dict[str, object] = json.loads((tmp_path / "out" / name / "summary.json").read_text())
        return document

    assert summary("slow")["test"] == {}
    assert summary("fast")["test"] == result["test"]
    assert (tmp_path / "out/fast/report.html").exists()

    with pytest.raises(UserError, match="is not empty; add --resume"):
        compare(variants(config), tmp_path / "out", said.append)
    written = (tmp_path / "out/slow/summary.json").stat().st_mtime_ns
    again = compare(variants(config)[:2], tmp_path / "out", said.append, resume=True)
    assert (tmp_path / "out/slow/summary.json").stat().st_mtime_ns == written, "it was finished, so it was kept"
    assert again["winner"] == "fast"
    assert again["test"] == result["test"]
    looks = (tmp_path / "out/fast/test_looks.jsonl").read_text().splitlines()
    assert len(looks) == 1, "a comparison that goes on does not look again"
    assert not (tmp_path / "out/slow/test_looks.jsonl").exists()
    assert again["test_seen_by"] == ["fast"]
    other = compare(variants(config)[:1], tmp_path / "out", said.append, resume=True)
    assert (other["winner"], other["test_seen_by"]) == ("slow", ["fast", "slow"])


@pytest.mark.parametrize("several", [False, True])
def test_a_test_that_was_evaluated_on_with_another_run_is_unseen_no_longer(
    make_config: MakeConfig, tmp_path: Path, run: Run, several: bool
) -> None:
    """Also one that is read by its ending, and one of several files."""
    table = tmp_path / "te.csv"
    table.write_text("text\nnine names\n")
    test = (str(table), str(write_jsonl(tmp_path / "te.jsonl", [{"text": "a stone"}]))) if several else str(table)
    two = variants(make_config(data__test=test, train__max_steps=2))[:2]
    compare(two, tmp_path / "out", print)
    assert run("evaluate", table, "--adapter", tmp_path / "out/slow/adapter")[0] == 0
    assert compare(two, tmp_path / "out", print, resume=True)["test_seen_by"] == ["fast", "slow"]


def test_the_best_is_measured_again_only_to_open_a_test_that_is_closed(
    make_config: MakeConfig, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes, real = list[bool](), compare_module.in_a_process

    def counted(*args: Any, with_test: bool = False, **more: Any) -> str:
        processes.append(with_test)
        return real(*args, with_test=with_test, **more)

    monkeypatch.setattr(compare_module, "in_a_process", counted)
    for name, test, opened in (("none", None, []), ("test", str(data_folder / "text.jsonl"), [True])):
        run = [Variant("run", {}, make_config(data__test=test, train__max_steps=1))]
        for resume, ran in ((False, [False, *opened]), (True, [])):
            processes.clear()
            result = compare(run, tmp_path / name, print, resume=resume)
            assert processes == ran
            assert (bool(result["test"]), result["test_seen_by"]) == (bool(test), ["run"] if test else [])


@pytest.mark.slow
def test_what_is_finished_is_kept_also_where_the_base_says_how_it_is_stored(
    make_config: MakeConfig, tiny_base: Path, tmp_path: Path
) -> None:
    """A run on NF4 files writes down their double quantization, not what was configured."""
    quantize_checkpoint(tiny_base, tmp_path / "nf4", double_quant=False)
    config = make_config(model__path=str(tmp_path / "nf4"), model__tokenizer=str(TOKENIZER), train__max_steps=2)
    slow = Variant("slow", {}, replace(config, train=replace(config.train, lr=1e-6)))
    for resume in (False, True):
        compare([slow, Variant("fast", {}, config)], tmp_path / "out", print, resume=resume)
        log = (tmp_path / "out/slow.log").read_text()
    assert log.count("weights learn") == 1


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("changed", ["data.train", "base_fingerprint", "tokenizer.sha256"])
def test_what_was_made_of_other_files_is_not_kept(
    make_config: MakeConfig, data_folder: Path, tmp_path: Path, changed: str, whole: bool
) -> None:
    """Nor gone on with, where it is not finished."""
    train, base, tokenizer = tmp_path / "train.jsonl", tmp_path / "base", tmp_path / "tokenizer.model"
    copyfile(data_folder / "train.jsonl", train)
    copyfile(TOKENIZER, tokenizer)
    save_hf(tiny_model(), base, dtype=torch.float32)
    config = make_config(
        data__train=str(train), model__path=str(base), model__tokenizer=str(tokenizer), train__max_steps=1
    )
    compare([Variant("kept", {}, config)], tmp_path / "out", print)
    if not whole:
        (tmp_path / "out/kept/summary.json").unlink()
    if changed == "data.train":
        train.write_text("".join(train.read_text().splitlines(keepends=True)[1:]))
    elif changed == "base_fingerprint":
        save_hf(tiny_model(seed=1), base, dtype=torch.float32, overwrite=True)
    else:
        model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.read_bytes())
        model.pieces[-1].score -= 1
        tokenizer.write_bytes(model.SerializeToString())
    new = Variant("new", {}, replace(config, train=replace(config.train, lr=1e-3)))
    with pytest.raises(UserError, match=rf"kept: {changed} was .* when the run began and is .*--overwrite"):
        compare([new, Variant("kept", {}, config)], tmp_path / "out", print, resume=True)
    assert not (tmp_path / "out/new").exists(), "nothing is trained before that is told"


def test_without_a_validation_there_is_nothing_to_rank_by(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ranked on validation.*data\.validation"):
        compare(variants(make_config(data__validation=None)), tmp_path / "out", print)


def test_what_is_not_measured_ranks_nothing_and_nothing_is_trained(make_config: MakeConfig, tmp_path: Path) -> None:
    for config, rank_by in ((make_config(), "bleu"), (make_config(eval__answers=0), "exact_match")):
        with pytest.raises(UserError, match=rf"--rank_by {rank_by}: is not measured; there are loss, perplexity"):
            compare(variants(config), tmp_path / "out", print, rank_by)
    with pytest.raises(UserError, match="no run has a rougeL"):  # known only once they have run
        compare(variants(make_config(eval__metrics=("rouge",)))[2:], tmp_path / "out", print, "rougeL")


def test_runs_that_are_measured_otherwise_are_refused_before_one_is_trained(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    two = [Variant(f"answers={n}", {}, make_config(eval__answers=n)) for n in (1, 2)]
    with pytest.raises(UserError, match=r"answers=2 has another eval\.answers than the runs before it"):
        compare(two, tmp_path / "out", pytest.fail)
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_made_is_told_before_a_run(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file" / "x", tmp_path / "a\0b"):
        with pytest.raises(UserError, match=r"cannot write here: .*; name another --output"):
            compare(variants(make_config()), output, pytest.fail)


def test_a_folder_takes_one_comparison_at_a_time(make_config: MakeConfig, tmp_path: Path) -> None:
    with hold(tmp_path / "out", "comparison", "--output"):
        for ways in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match=r"out: another comparison writes here; .* name another --output"):
                compare(variants(make_config()), tmp_path / "out", pytest.fail, **ways)
    assert [file.name for file in (tmp_path / "out").iterdir()] == [LOCK]


def test_where_every_run_fails(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run has a loss.*nowhere\.jsonl"):
        compare(variants(make_config())[2:], tmp_path / "out", print)
    assert not (tmp_path / "out/compare.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "during"), [(signal.SIGTERM, "steps"), (signal.SIGHUP, "steps"), (signal.SIGINT, "set-up")]
)
def test_a_signal_to_all_processes_ends_them_in_one_line_and_the_comparison_goes_on_after_it(
    make_config: MakeConfig, tmp_path: Path, signum: int, during: str
) -> None:
    config = make_config(train__max_steps=10_000)
    (tmp_path / "long.toml").write_text(config_toml(config))
    command = [sys.executable, "-m", "minilora", "compare", str(tmp_path / "long.toml"), "--grid", "train.lr=1e-3,1e-2"]
    command += ["--output", str(tmp_path / "out")]
    run = tmp_path / "out" / "lr=1e-3"
    begun, lines = (run / "metrics.jsonl", 3) if during == "steps" else (Path(f"{run}.log"), 0)
    old = signal.signal(signum, signal.SIG_DFL)  # whatever the tests were started with, such as nohup's
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    finally:
        signal.signal(signum, old)
    with process:
        try:
            while not begun.exists() or len(begun.read_text().splitlines()) < lines:
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.01)
            os.killpg(process.pid, signum)
            _, error = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 128 + signum
    assert len(error.splitlines()) == 1, error
    assert "go on with --resume" in error
    if during == "steps":
        assert list((run / "checkpoints").glob("step-*")), "the run saved before it stopped"
    assert not (tmp_path / "out" / "lr=1e-2").exists()


def test_a_folder_for_temporary_files_that_is_too_long_is_named(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """As Python says it up to 3.13.5; later ones put the socket elsewhere."""

    def start(_: object) -> None:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr("multiprocessing.context.ForkServerProcess.start", start)
    monkeypatch.setenv("TMPDIR", "/a/long/one")
    got = run("compare", toml, "--grid", "train.lr=1e-3", "--output", tmp_path / "out")
    why = "the process of a run cannot be started: AF_UNIX path too long; its socket lies in TMPDIR, /a/long/one: "
    refused(got, 1, f"minilora compare: {why}name a short one")


def test_a_log_that_cannot_be_written_is_that_run_s_failure(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "out" / "slow.log").mkdir(parents=True)
    one, two = variants(make_config(train__max_steps=1))[:2]
    result = compare([one, two], tmp_path / "out", print, overwrite=True)
    assert result["rows"][0]["failed"] == f"IsADirectoryError, see {tmp_path}/out/slow.log"
    assert result["winner"] == "fast"
