"""The comparison compares equal work, and all of it runs on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import compiles_loops
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import contestants, nf4_cpu, profile_step, train_step
from benchmarks.feeds import load_samples, packed_batches, peer_batches, save_samples, tokens_of_steps
from benchmarks.harness import Measured, Record
from benchmarks.instructions import distribution, instruction_samples
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.shapes import block_linear_parameters, shape
from benchmarks.train_step import QUICK, cells, our_variants, peer_variants
from minilora.data.encode import Sample
from minilora.loss import IGNORE


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return instruction_samples(1024)


def test_the_instruction_set_has_many_samples_and_a_long_tail(samples: list[Sample]) -> None:
    found = distribution(samples)
    assert found["samples"] >= 500
    assert found["lengths"]["max"] <= 1024
    assert found["lengths"]["p99"] > 8 * found["lengths"]["median"]
    assert all(sample.target_mask.any() and not sample.target_mask[0] for sample in samples)


def test_both_sides_are_fed_the_same_tokens(samples: list[Sample], tmp_path: Path) -> None:
    some = samples[:3]
    save_samples(some, tmp_path / "samples.npz")
    again = load_samples(tmp_path / "samples.npz")
    for a, b in zip(some, again, strict=True):
        assert (a.tokens == b.tokens).all()
        assert (a.target_mask == b.target_mask).all()
    feed = {"samples": str(tmp_path / "samples.npz"), "steps": [[0, 2], [1]], "max_seq_len": 1024}
    assert tokens_of_steps(feed) == [some[0].length + some[2].length, some[1].length]
    for i, packed in enumerate(packed_batches(feed)):
        flat, padded = peer_batches(feed, "flat")[i], peer_batches(feed, "padded")[i]
        n = tokens_of_steps(feed)[i]
        real = padded["attention_mask"].bool()
        assert packed.tokens.shape == (1, 1024)
        for ours, key in (
            (packed.tokens, "input_ids"),
            (packed.labels, "shift_labels"),
            (packed.positions, "position_ids"),
        ):
            assert torch.equal(ours[0, :n], flat[key][0])
            assert torch.equal(ours[0, :n], padded[key][real])
        assert bool((packed.labels[0, n:] == IGNORE).all())
        assert bool((padded["shift_labels"][~real] == IGNORE).all())


def test_a_random_batch_has_a_target_at_every_token() -> None:
    feed = {"rows": 2, "length": 5, "vocab_size": 100}
    [batch], [peer] = packed_batches(feed), peer_batches(feed, "rows")
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.n_targets == 10
    assert torch.equal(peer["input_ids"], batch.tokens)
    assert torch.equal(peer["labels"], batch.labels)


def test_the_peer_is_taken_in_all_its_variants() -> None:
    assert set(cells()) == {f"{c}-{d}" for c in ("4x256", "1x1024", "instructions") for d in ("fp32", "bf16")}
    assert len(peer_variants(cells()["4x256-fp32"], "", {})) == 10
    assert len(peer_variants(cells()["instructions-fp32"], "", {})) == 16
    assert len(peer_variants(cells()["1x1024-bf16"], "", {})) == 17
    for variants in (our_variants(cells()["4x256-fp32"], "", {}), peer_variants(cells()["4x256-fp32"], "", {})):
        for name, contestant in variants.items():
            assert contestant.arguments.get("compiled", False) == ("compiled" in name)


def test_who_computes_another_loss_is_out_of_the_comparison() -> None:
    def record(name: str, seconds: float, private: int, loss: float) -> Record:
        step = Measured(seconds, private, private, {"loss": loss, "tokens": 64})
        return Record(name, [step, step], step)

    records = {
        "minilora": record("minilora", 2.0, 200, 10.0),
        "minilora, checkpointing": record("minilora, checkpointing", 3.0, 100, 10.0),
        "slow": record("slow", 4.0, 500, 10.00005),
        "lean, checkpointing": record("lean, checkpointing", 6.0, 300, 10.0),
        "cheat": record("cheat", 1.0, 1, 10.0005),
        "broken": Record("broken", error="it broke"),
    }
    ours, peers = ["minilora", "minilora, checkpointing"], ["slow", "lean, checkpointing", "cheat", "broken"]
    pair = [records["minilora"], records["slow"]]
    report = train_step._report(QUICK["quick"], records, ours, peers, pair)
    assert report["left_out_for_another_loss"] == ["cheat"]
    assert report["variants"]["broken"] == {"error": "it broke"}
    assert report["speed"]["ratio"]["of_medians"] == 2.0
    assert report["speed"]["ours"]["tok_per_s"] == 32.0
    assert report["memory"]["ratio"] == 3.0  # both with checkpointing
    assert [line["ratio"] for line in report["rows"]] == ["2.00 (2.00 to 2.00)", "3.00"]
    assert "error" in train_step._report(QUICK["quick"], records, ours, ["cheat"], [])
    raced = train_step._report(QUICK["quick"], records, ours, peers, [records["minilora"], records["cheat"]])
    assert "other losses" in raced["error"]
    with_shared = train_step._report(QUICK["quick"], records, ours, peers, [*pair, record("shared", 1.0, 1, 0.0)])
    assert with_shared["speed"]["ratio"] == report["speed"]["ratio"]
    assert with_shared["rows"][-1]["ratio"] == "4.00 (4.00 to 4.00)"
    assert with_shared["speed"]["not_compiled"]["ratio"] == report["speed"]["ratio"]
    fast = [record("minilora, compiled", 1.0, 250, 10.0), record("slow, compiled", 2.5, 500, 10.0)]
    every = records | {one.name: one for one in fast}
    names = [*ours, fast[0].name], [*peers, fast[1].name]
    compiled = train_step._report(QUICK["quick"], every, *names, [*fast, record("shared", 1.0, 1, 0.0), *pair])
    assert compiled["speed"]["ratio"]["of_medians"] == 2.5
    assert compiled["speed"]["not_compiled"]["ratio_of_our_fastest"]["of_medians"] == 4.0
    assert [line["ratio"].split()[0] for line in compiled["rows"]] == ["2.50", "3.00", "2.00", "2.50"]
    real, flat = QUICK["quick-instructions"], [record("slow, compiled, flat", 5.0, 500, 10.0)]
    unpadded = train_step._report(real, records | {flat[0].name: flat[0]}, ours, [*peers, flat[0].name], [*pair, *flat])
    assert unpadded["speed"]["ratio"]["of_medians"] == 2.0
    assert unpadded["speed"]["padding_free"]["ratio"]["of_medians"] == 2.5
    assert unpadded["rows"][-1]["what"].endswith(": the peer without padding")
    failed = train_step._report(QUICK["quick"], records, ours, peers, [*pair, Record("shared", error="it broke")])
    assert (failed["rows"], failed["speed"]["shared_work"]) == (report["rows"], {"error": "it broke"})


class Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def test_what_both_sides_share_is_the_products_of_a_step() -> None:
    """Besides attention, which is no product of its own."""
    config, tokens = shape("tiny"), 2 * 32
    step = contestants.shared_work("float32", {"rows": 2, "length": 32}, "tiny")
    with Products() as counted:
        assert step() == {"tokens": tokens}
    of_first = 2 * config.dim * config.head_dim * (config.n_heads + 2 * config.n_kv_heads) * tokens
    weights = block_linear_parameters(config) + config.vocab_size * config.dim
    assert counted.flops == 4 * weights * tokens - of_first


def test_wrong_usage() -> None:
    for wrong in (["--only", "nonsense"], ["--rounds", "0"]):
        with pytest.raises(SystemExit, match="2"):
            train_step.main(wrong)


@pytest.mark.slow
def test_both_sides_train_alike_on_real_samples(tmp_path: Path) -> None:
    """Equal losses after updates, samples packed here and padding-free there: the work is the same. In processes."""
    out = tmp_path / "out.json"
    assert train_step.main(["--only", "quick-instructions", "--rounds", "3", "--out", str(out)]) == 0
    part = json.loads(out.read_text())["parts"]["quick-instructions"]
    assert part["speed"]["same_losses"]["largest_relative_difference"] < 1e-4
    assert part["speed"]["ratio"]["n_pairs"] == 3
    assert part["memory"]["ratio"] > 0
    assert len(part["rows"]) == 2
    assert str(tmp_path) not in out.read_text()


@pytest.mark.usefixtures("no_processes")
@pytest.mark.filterwarnings("ignore")
def test_random_tokens_are_raced_beside_what_both_sides_share(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert train_step.main(["--only", "quick", "--rounds", "2", "--out", str(out)]) == 0
    part = json.loads(out.read_text())["parts"]["quick"]
    assert part["speed"]["same_losses"]["largest_relative_difference"] < 1e-4
    assert part["speed"]["shared_work"]["ratio"]["n_pairs"] == 2
    assert len(part["rows"]) == 3


class Adapters(TorchDispatchMode):
    """Remembers in which dtypes adapters are multiplied with, whose one side is the rank."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes = set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket == torch.ops.aten.mm and contestants.RANK in args[0].shape:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("no_processes")
@pytest.mark.filterwarnings("ignore")
def test_under_autocast_the_peer_learns_the_same_and_faster_adapters(tmp_path: Path) -> None:
    make_checkpoint(shape("tiny"), tmp_path / "m")
    feed = {"rows": 2, "length": 32, "vocab_size": 512}
    cell = replace(QUICK["quick"], dtype="bfloat16")
    mine = contestants.ours(str(tmp_path / "m"), "bfloat16", feed, False)
    losses, multiplied = [[mine()["loss"] for _ in range(3)]], []
    for autocast in (False, True):
        step = contestants.peer(str(tmp_path / "m"), "bfloat16", feed, "rows", "sdpa", False, False, autocast=autocast)
        with Adapters() as seen:
            losses.append([step()["loss"] for _ in range(3)])
        multiplied.append(seen.dtypes)
    assert multiplied == [{torch.float32}, {torch.bfloat16}]
    assert all(train_step._are_equal(cell, losses[0], theirs) for theirs in losses[1:])


@compiles_loops
@pytest.mark.slow
@pytest.mark.usefixtures("no_processes")
@pytest.mark.filterwarnings("ignore")
def test_nf4_is_compared_after_it_is_found_equal(tmp_path: Path) -> None:
    out = tmp_path / "nf4.json"
    assert nf4_cpu.main(["--quick", "--rounds", "2", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert len(result["cases"]) == 12
    assert len(result["rows"]) == 13  # of absmax in 8 bits; compiled, too, but for quantizing
    assert all(ratio["n_pairs"] == 2 for case in result["cases"].values() for ratio in case["ratios"].values())
    assert result["equal_to_bitsandbytes"]["128x256"]["nested_largest_difference"] < 0.02


@pytest.mark.slow
def test_the_profile_accounts_for_the_step(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    assert profile_step.main(["--quick", "--dtypes", "float32", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())["dtypes"]["float32"]
    assert sum(figures["groups"].values()) == pytest.approx(figures["profiled_seconds"], rel=0.05)
    assert all(figures["groups"][name] > 0 for name in profile_step.GROUPS)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_half_a_profile_does_not_take_the_place_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile_step, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="2"):
        profile_step.main(["--dtypes", "float32"])
    assert "--dtypes needs --out" in capsys.readouterr().err


def test_the_profile_is_drawn_of_the_committed_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each panel's title has the step without the profiler and the one with it, to which its bars add up."""
    monkeypatch.setattr(profile_step, "FIGURE", tmp_path / "x.png")
    assert profile_step.main(["--draw"]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    for dtype, figures in json.loads((profile_step.RESULTS / "profile_step.json").read_text())["dtypes"].items():
        title = profile_step.title(dtype, figures)
        assert f"{figures['seconds']:.2f} s a step" in title
        assert f"{sum(figures['groups'].values()):.2f} s under the profiler" in title
    assert profile_step.main(["--draw", "--out", str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_page_says_what_the_profile_says() -> None:
    page = " ".join((profile_step.ROOT / "docs" / "where_the_time_goes.md").read_text().split())
    dtypes = json.loads((profile_step.RESULTS / "profile_step.json").read_text())["dtypes"]
    shares = {
        dtype: {group: seconds / figures["profiled_seconds"] for group, seconds in figures["groups"].items()}
        for dtype, figures in dtypes.items()
    }
    products = {dtype: f"{of['frozen weights'] + of['head and loss']:.0%}" for dtype, of in shares.items()}
    assert f"most of it**, {products['float32'][:-1]} %" in page
    assert f"they are {products['bfloat16'][:-1]} %" in page
    assert max(shares["bfloat16"], key=shares["bfloat16"].__getitem__) == "elementwise"
    assert f"the largest group, {shares['bfloat16']['elementwise']:.0%}"[:-1] in page
