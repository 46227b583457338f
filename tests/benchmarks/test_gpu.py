"""All that needs a GPU, on a CPU: that each part runs, what a failing one does, and how times become figures."""

import json
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from math import isnan, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from marks import interpreted

import benchmarks.gpu as gpu
from benchmarks import gpu_decode, gpu_harness, gpu_models, gpu_torchtune, gpu_train
from benchmarks.gpu_harness import Timing, in_turns, peer_sets, report, run_part
from benchmarks.gpu_train import COMPARED, POLICIES, _cases, agreeing
from benchmarks.harness import Entrant, Measured, Record, row, rows_of
from benchmarks.shapes import SHAPES, qlora_step_flops
from minilora.backend import Backend
from minilora.config import ModelConfig
from minilora.errors import UserError
from minilora.fused import Keep

# Bytes and FLOP. A weight takes 1/2 byte, and by 64 of them an absmax of 1; and by 256 of those 4, and once 4.
BY_HAND = {
    "dequantize, nested, 16 x 128 to float16": (1024 + 32 + 8 + 2 * 2048, 0),
    "quantize, nested, 16 x 128": (2 * 2048 + 1024 + 32 + 8, 0),
    "softmax_gradient, 3 x 77": (2 * 2 * 231 + 12 * 3, 0),  # read, written; a label of 8 and a loss of 4
    "adamw, 3 of 2 x 128": (28 * 768, 0),  # p, m and v read and written, the gradient read: 7 times 4
    "adamw_8bit, 3 of 2 x 128": (16 * 768, 0),  # m and v of 1
    "matvec, M = 1, nested, 48 x 128": (3072 + 96 + 8 + 2 * (128 + 48), 2 * 6144),
    "matvec, M = 2, nested, 48 x 128": (3072 + 96 + 8 + 2 * 2 * (128 + 48), 2 * 2 * 6144),
    "matmul, M = 3, nested, 48 x 128": (3072 + 96 + 8 + 2 * 3 * (128 + 48), 2 * 3 * 6144),
    "matmul, M = 17, nested, 48 x 128": (3072 + 96 + 8 + 2 * 17 * (128 + 48), 2 * 17 * 6144),
}
RATES = (("gb", "copy_gb"), ("tflop", "matmul_tflop"))


@interpreted
def test_a_dry_run_of_the_operations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--dry", "--only", "ops", "--out", str(out)]) == 0
    parts = json.loads(out.read_text())["parts"]
    elementwise = {"norm", "rope", "swiglu", "softmax_gradient", "adamw"}
    assert parts.keys() == {"ceilings", "dequantize", "quantize", "matvec", "matmul"} | elementwise
    ceilings = parts.pop("ceilings")
    for name, part in parts.items():
        assert part["machine"]["gpu"] == "none, a dry run"
        for what, case in part["cases"].items():
            assert what.startswith(name)
            assert {"minilora"} < case["timings"].keys()
            of_copy, of_matmul = (case[f"{rate}_per_s"] / ceilings[f"{most}_per_s"] for rate, most in RATES)
            assert case["share_of_ceiling"] == pytest.approx(max(of_copy, of_matmul), rel=1e-4)
    told = {what: case for part in parts.values() for what, case in part["cases"].items()}
    for what, (n_bytes, flops) in BY_HAND.items():
        assert told[what]["bytes"] == n_bytes, what
        us = told[what]["timings"]["minilora"]["median_us"]
        assert told[what]["tflop_per_s"] * us * 1e6 == pytest.approx(flops, rel=1e-4), what
    for name in ("dequantize", "norm", "rope", "swiglu"):
        assert all(case["share_of_copy"] > 0 for case in parts[name]["cases"].values())
    assert "failed" not in capsys.readouterr().out


@interpreted
def test_one_operation_alone_has_its_share_of_the_ceilings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["rope", "--dry", "--out", str(out)])
    with pytest.raises(SystemExit, match="0"):
        run_part("rope")
    parts = json.loads(out.read_text())["parts"]
    assert parts.keys() == {"ceilings", "rope"}
    assert all(case["share_of_ceiling"] > 0 for case in parts["rope"]["cases"].values())


def test_each_part_s_module_runs_it() -> None:
    modules = {file.stem: file.read_text() for file in Path(gpu.__file__).parent.glob("*.py")}
    run = {part: name for name, text in modules.items() for part in re.findall(r'^    run_part\("(\w+)"\)', text, re.M)}
    trains = {part for part, (kind, _) in gpu.PARTS.items() if kind == "train"}
    assert run.keys() == gpu.PARTS.keys() - {"equality", "ceilings"} - trains | {"train"}
    assert all(name in (part, f"nf4_{part}", f"gpu_{part}") for part, name in run.items())


@pytest.mark.slow
@pytest.mark.usefixtures("no_processes")
@pytest.mark.filterwarnings("ignore")
def test_a_dry_run_of_the_whole_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both sides draw the same weights and adapters, so they learn the same and say the same."""
    out = tmp_path / "gpu.json"
    assert gpu.main(["--dry", "--only", "train_512", "train_memory", "decode", "--out", str(out)]) == 0
    parts = json.loads(out.read_text())["parts"]
    *raced, of_ceiling = parts["train_512"]["cases"].values()
    memory = parts["train_memory"]["cases"].values()
    assert [len(case["sides"]) for case in raced] == [2, 2, 1, 1]  # ours alone: decoded ahead, and decoded
    assert of_ceiling["share_of_matmul"] > 0
    assert len(memory) == len(Keep) + 1
    assert all(case["predicted"] > 0 for case in memory)
    for case in raced:
        ours, *peers = case["sides"].values()
        assert all(ours["losses"] == pytest.approx(peer["losses"], rel=1e-4) for peer in peers)
        assert ours["losses"][0] < ours["first_loss"]
        assert (ours["backend"], ours["graph"], ours["warnings"]) == ("torch", False, [])
        assert all("backend" not in peer and "warnings" in peer for peer in peers)
    [decoding] = parts["decode"]["cases"].values()
    assert decoding["share_of_equal_tokens"] == 1
    assert (decoding["minilora"]["backend"], decoding["minilora"]["graph"]) == ("torch", False)
    assert len(parts["train_512"]["rows"]) == 6
    assert len(parts["decode"]["rows"]) == 1
    assert "failed" not in (said := capsys.readouterr().out)
    assert len(re.findall(r"^16 tokens, activations .*: minilora \d+ tokens/s", said, re.M)) == 4  # as each race ends


def test_a_result_says_what_was_warned_of_in_its_setting() -> None:
    def begin(first: bool) -> None:
        if first:
            warnings.warn("goes on without a graph", stacklevel=2)

    def work(first: bool) -> dict[str, Any]:
        warnings.warn(f"/a/folder/file.py: again, {first}", stacklevel=2)
        return {"loss": 1.0}

    step = gpu_models.steps(torch.device("cpu"), begin, {"train": work})
    said = ["goes on without a graph", "file.py: again, True"]
    for _ in range(2):
        assert step(work="train", first=True) == {"loss": 1.0, "warnings": said}
    assert step(work="train", first=False) == {"loss": 1.0, "warnings": ["file.py: again, False"]}


def test_a_gpu_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_models, "backend_for", lambda _: Backend("torch", "Triton finds no C compiler"))
    with pytest.raises(UserError, match=r"^cuda has no kernels: Triton finds no C compiler$"):
        gpu_models.ours("tiny", "cuda", adapters=True)


def test_who_has_another_loss_is_out() -> None:
    """Mean losses of random weights are alike whatever was computed: 2e-3 is another one, 2e-4 what 16 bits round."""
    ours, same, other = (record(loss) for loss in (10.0, 10.002, 10.02))
    assert agreeing(ours, same, other, Record("failed", error="out of memory")) == [same]
    theirs = [record(loss, name="torchtune") for loss in (10.005, 10.02)]
    assert agreeing(ours, record(10.005), *theirs) == theirs[:1]
    assert agreeing(Record("failed"), same) == []


RACED = (0, 2)  # by the peers
RIGHT, LATER_WRONG = (10.0, 9.9, 9.8), (10.0, 9.9, 10.0)


@pytest.mark.parametrize(
    ("wrong", "losses"),
    [
        ((), RIGHT),
        ((0,), (10.02, 9.92, 9.82)),
        ((0,), LATER_WRONG),  # a replay, or a backward, that does not what it should
        ((0,), (nan, nan, nan)),
        ((1,), LATER_WRONG),
        ((2,), LATER_WRONG),
        ((3,), (10.0, nan, nan)),
        ((0, 1, 2, 3), LATER_WRONG),
    ],
)
@pytest.mark.parametrize("has_peers", [True, False])
def test_wrong_steps_of_ours_have_no_ratio(wrong: tuple[int, ...], losses: tuple[float, ...], has_peers: bool) -> None:
    """By the place of their policy: all activations, decoded ahead, checkpointed, decoded weights."""
    if not has_peers and (wrong == (0, 1, 2, 3) or (wrong == (0,) and not isnan(losses[0]))):
        return  # nobody could tell
    records = {
        policy: [
            record(*(losses if i in wrong else RIGHT)),
            *[record(*RIGHT, name="peft")] * (has_peers and i in RACED),
        ]
        for i, policy in enumerate(POLICIES)
    }
    cases = [*_cases("tiny", 16, records, 1.0).values()]
    failed = [i for i, case in enumerate(cases[:4]) if gpu._failed({"cases": {"": case}})]
    assert failed == [*wrong]
    for i, case in enumerate(cases[:4]):
        assert bool(case["rows"]) == (has_peers and i not in wrong)
        assert ("peft" in case.get("ratios", ())) == (has_peers and i in RACED and i not in wrong)
    assert len(cases) == (4 if len(wrong) == 4 else 5)  # with the share of the ceiling, where one is right


def test_a_peer_s_wrong_steps_are_left_out_by_name() -> None:
    kept = [record(*RIGHT), record(*RIGHT, name="peft"), record(*LATER_WRONG, name="peft, compiled")]
    case, _ = _cases("tiny", 16, {"kept": kept}, 1.0).values()
    assert case["left_out_for_other_losses"] == ["peft, compiled"]
    assert case["ratios"].keys() == {"peft"}


def test_later_losses_drift_apart() -> None:
    """What rounding makes of them after many updates says nothing."""
    ours, peer = (record(*[10.0] * COMPARED, late) for late in (10.0, 9.0))
    assert agreeing(ours, peer) == [peer]


@pytest.mark.parametrize(
    ("part", "failed"),
    [
        ({"error": "no"}, True),
        ({"cases": {"a": {"sides": {"minilora": {"error": "out of memory"}, "peft": {}}}}}, True),
        ({"cases": {"a": {"minilora": {"error": "out of memory"}}}}, True),
        ({"cases": {"a": {"error": "no step"}}}, True),
        ({"cases": {"a": {"sides": {"minilora": {}, "peft": {"error": "no"}}}, "b": {"gb_per_s": 1.0}}}, False),
    ],
)
def test_a_part_has_failed_if_ours_has_in_any_case(part: dict[str, Any], failed: bool) -> None:
    assert gpu._failed(part) == failed


def test_a_policy_that_ours_fails_at_loses_no_other() -> None:
    kept = [Record("minilora", error="out of memory"), record(10.0, name="peft")]
    both = [record(10.0), record(10.0, name="peft")]
    lost, told, _ = _cases("tiny", 16, {"kept": kept, "checkpointed": both}, 1.0).values()
    assert lost["sides"]["minilora"] == {"error": "out of memory"}
    assert not lost["rows"]
    assert len(told["rows"]) == 1


def test_each_stack_has_ratios_of_its_own() -> None:
    """Of the stack's fastest variant with the same losses; where ours runs alone, of its fastest of all."""
    kept = [record(10.0), *(record(10.0, name=f"peft, {how}", seconds=s) for how, s in (("prepared", 2.0), ("b", 3.0)))]
    kept += [Record("peft, c", error="out of memory"), record(10.0, name="torchtune", seconds=4.0)]
    records = {"kept": kept, "kept with the decoded weights": [record(10.0)]}
    both, alone, of_ceiling = _cases("tiny", 16, records, 1e-12).values()
    assert {name: found["of_medians"] for name, found in both["ratios"].items()} == {
        "peft, prepared": 2.0, "peft, b": 3.0, "torchtune": 4.0,
    }  # fmt: skip
    assert len({line["what"] for line in both["rows"]}) == 4
    assert [line["ratio"] for line in alone["rows"]] == ["2.00", "4.00"]
    assert [line["peer"] for line in alone["rows"]] == [
        "8 tokens/s (peft, prepared; incomplete, without peft, c)",
        "4 tokens/s (torchtune)",
    ]
    assert of_ceiling["share_of_matmul"] == qlora_step_flops(SHAPES["tiny"], 1, 16)


def test_memory_is_that_of_all_steps() -> None:
    """Of a replayed one nothing is allocated, and the one before may have reserved more."""
    steps = [
        Measured(1.0, 0, 0, {"loss": 10.0, "peak_allocated_bytes": a << 30, "peak_reserved_bytes": r << 30})
        for a, r in ((5, 6), (2, 7), (2, 3))
    ]
    ours, peer = Record("minilora", steps[1:], steps[0]), Record("peft", steps[:1], steps[0])
    case, _ = _cases("tiny", 16, {"kept": [ours, peer]}, 1.0).values()
    assert case["sides"]["minilora"]["peak_allocated_bytes"] == 5 << 30
    line = next(line for line in case["rows"] if line["what"].endswith("peak memory"))
    assert (line["ours"], line["peer"], line["ratio"]) == ("7.00 GiB", "6.00 GiB (peft)", "0.86")


@pytest.mark.parametrize(("last_gib", "error"), [(23, None), (25, "took more"), (None, "out of memory")])
def test_whether_a_card_of_24_gib_holds_it(
    last_gib: int | None, error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step took of the card that others had not taken before, in any of its three."""
    peaks = {f"peak_{kind}_bytes": 20 << 30 for kind in ("allocated", "reserved")} | {"predicted_bytes": 19 << 30}
    steps = [Measured(1.0, 0, 0, peaks | {"card_bytes": (gib or 0) + 1 << 30}) for gib in (22, last_gib, 21)]
    found = Record("minilora", steps[1:], steps[0]) if last_gib else Record("minilora", error="out of memory")
    monkeypatch.setattr(gpu_train, "race", lambda *_, **__: [found])
    setting: dict[str, Any] = {"length": 32, "keep": "INPUT", "limit_bytes": 25 << 30}
    [case] = gpu_train._memory([], "tiny", 1 << 30, **setting).values()
    [line] = case["rows"]
    assert line["what"].endswith("on a card of 24.00 GiB")
    assert case.get("error", "").startswith(error or "")
    assert ("error" in case) == bool(error)
    assert line["ours"].endswith("out of memory" if last_gib is None else f"{max(22, last_gib)}.00 GiB on the card")


def test_a_limit_is_the_whole_card_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 bytes 60 are free, 15 are torch's here and 25 others' or the driver's: of 50 it may have 25."""
    fractions = list[float]()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 15)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    gpu_models._limit(50)
    assert fractions == [0.25]


def record(*losses: float, name: str = "minilora", seconds: float = 1.0) -> Record:
    steps = [Measured(seconds, 0, 0, {"loss": loss}) for loss in losses]
    return Record(name, steps, steps[0])


@pytest.mark.skipif(not gpu_torchtune.is_there(), reason="torchtune is not installed: it pins other versions")
@pytest.mark.filterwarnings("ignore")
def test_torchtune_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same weights; absmax in other 8 bits differ by up to 1 in 256, losses of random tokens by some 1e-4."""
    config = ModelConfig(256, 2, 32, 512, n_heads=8, n_kv_heads=4, vocab_size=4096)  # its quantizer wants as much
    monkeypatch.setitem(SHAPES, "tiny", config)
    steps = [make("tiny", "cpu", True) for make in (gpu_models.ours, gpu_torchtune.torchtune)]
    for keep in ("ALL", "INPUT"):
        for _ in range(3):
            ours, theirs = (step(work="train", rows=1, length=48, keep=keep)["loss"] for step in steps)
            assert ours == pytest.approx(theirs, rel=3e-4)


def test_what_was_measured_before_a_part_failed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: torch.device) -> Iterator[dict[str, Any]]:
        yield {"cases": {"first": {"x": 1}}, "rows": [row("first", "1 s", "2 s", "2.00")]}
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "PARTS", {"train_512": ("train", fails)})
    out = tmp_path / "gpu.json"
    assert gpu.main(["--dry", "--out", str(out)]) == 1
    part = json.loads(out.read_text())["parts"]["train_512"]
    assert part["cases"] == {"first": {"x": 1}}
    assert len(part["rows"]) == 1


def test_no_race_begins_when_the_part_s_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_train, "PART_S", 0.0)
    monkeypatch.setattr(gpu_train, "started", lambda some, **_: nullcontext([Entrant(one.name) for one in some]))
    *_, cases = gpu_train.measure(torch.device("cpu"), 512)
    assert len(cases) == len(POLICIES)
    assert {side["error"] for case in cases.values() for side in case["sides"].values()} == {
        "not run: the part's time was over"
    }


@pytest.mark.parametrize(
    ("card", "file"), [("NVIDIA H200", "gpu_h200"), ("NVIDIA GeForce RTX 4090", "gpu_geforce_rtx_4090")]
)
def test_each_card_has_a_file_of_its_own(card: str, file: str) -> None:
    assert gpu.file_of(card) == file


def test_a_part_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: torch.device) -> dict[str, object]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "PARTS", {"first": ("ops", fails), "ceilings": ("ceilings", gpu.ceilings)})
    out = tmp_path / "gpu.json"
    assert gpu.main(["--dry", "--out", str(out)]) == 1
    parts = json.loads(out.read_text())["parts"]
    assert parts["first"]["error"] == "RuntimeError: no such kernel"
    assert parts["ceilings"]["copy_gb_per_s"] > 0
    assert "failed: parts/first: RuntimeError: no such kernel" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "gpu: there is no GPU; --dry runs all of it on a CPU, small\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", 'no object with "parts"'),
        ("{}", 'no object with "parts"'),
        ('{"parts": []}', 'no object with "parts"'),
        ("junk", 'no object with "parts"'),
        (None, "Is a directory"),
    ],
)
def test_a_result_that_cannot_be_added_to_is_found_first(
    text: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "PARTS", {})
    out = tmp_path / "gpu.json"
    if text is None:
        out.mkdir()
    else:
        out.write_text(text)
    assert gpu.main(["--dry", "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"gpu: {out}: {words}" if text is None else f"gpu: {out}: is {words}")
    assert err.count("\n") == 1
    if text is not None:
        assert out.read_text() == text


def test_a_result_is_not_made_before_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PARTS", {})
    out = tmp_path / "results" / "gpu.json"
    assert gpu.main(["--dry", "--out", str(out)]) == 0
    assert not out.exists()


def test_every_set_of_data_has_its_turn() -> None:
    called: list[int] = []
    timings = in_turns({"a": [lambda i=i: called.append(i) for i in range(2)]}, torch.device("cpu"))
    assert called == [0, 1, 0, 1]  # a warm-up of each, then two rounds
    assert len(timings["a"].us) == 2


class Queue:
    """A GPU that does work in order, and the CPU's clock beside it; both in ms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.busy_until = 0.0
        monkeypatch.setattr(torch.cuda, "_sleep", lambda _: self.launch(20.0))
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event(self))

    def launch(self, ms: float, host_ms: float = 0.0) -> None:
        self.now += host_ms
        self.busy_until = max(self.now, self.busy_until) + ms

    def wait(self) -> None:
        self.now = max(self.now, self.busy_until)


class Event:
    def __init__(self, queue: Queue) -> None:
        self.queue, self.at = queue, 0.0

    def record(self) -> None:
        self.at = max(self.queue.now, self.queue.busy_until)

    def query(self) -> bool:
        return self.at <= self.queue.now

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


@pytest.mark.parametrize("host_ms", [0.01, 1.0, 8.0])
def test_a_gpu_s_times_hold_no_launching(host_ms: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CPU cannot keep ahead for a batch, it can for a smaller one."""
    queue = Queue(monkeypatch)
    calls = {name: [lambda ms=ms: queue.launch(ms, host_ms)] for name, ms in (("a", 0.25), ("b", 0.5))}
    found = in_turns(calls, torch.device("cuda"), rounds=15)
    assert [timing.us for timing in found.values()] == [pytest.approx((250.0,) * 15), pytest.approx((500.0,) * 15)]
    assert not any(timing.host_bound for timing in found.values())


def test_who_has_the_gpu_wait_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose calls wait for it or are long in launching; not who comes before them, right behind the sleep."""
    queue = Queue(monkeypatch)

    def waits() -> None:
        queue.launch(1.0, 0.1)
        queue.wait()

    calls = {"short": [lambda: queue.launch(1.0, 0.1)], "long": [lambda: queue.launch(1.0, 30.0)], "waits": [waits]}
    found = in_turns(calls, torch.device("cuda"), rounds=3)
    assert {name: timing.host_bound for name, timing in found.items()} == {"short": False, "long": True, "waits": True}
    assert found["short"].us == pytest.approx((1000.0,) * 3)
    case = report("a", {"minilora": found["short"], "peft": found["waits"]}, 1.0, peers=("peft",))
    assert "host_bound" not in case["timings"]["minilora"]
    assert case["timings"]["peft"]["host_bound"] is True
    assert [line["ratio"] for line in case["rows"]] == ["1.00, host-bound"]


def test_a_peer_that_cannot_run_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")

    def of_another_build(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", of_another_build)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    assert peer_sets(on_gpu, 2) == []
    assert capsys.readouterr().err == "bitsandbytes is left out: RuntimeError: no kernel image\n"


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a copy what is read and written; of a square product two FLOP a multiplication."""
    for module in (gpu, gpu_harness):
        monkeypatch.setattr(module, "in_turns", lambda calls, _: dict.fromkeys(calls, Timing((4.0, 5.0, 50.0))))
    found = gpu.ceilings(torch.device("cpu"))
    assert found["copy_gb_per_s"] == pytest.approx(2 * 65536 / 5e-6 / 1e9)
    assert found["matmul_tflop_per_s"] == pytest.approx(2 * 64**3 / 5e-6 / 1e12)
    assert found["copy"]["median_us"] == 5.0


def answer(*seconds: float, tokens: int, **said: Any) -> Record:
    result = {"tokens": [7] * tokens, "peak_reserved_bytes": 9, "backend": "triton", **said}
    steps = [Measured(s, 0, 0, result) for s in seconds]
    return Record("minilora", steps, steps[0])


def test_a_token_takes_what_the_longer_answer_takes_longer() -> None:
    one = answer(0.1, 0.3, 0.2, tokens=1, graph=False)
    short = answer(0.5, 0.6, 0.7, tokens=16, graph=True, warnings=["once"])
    long = answer(1.0, 1.4, 1.2, tokens=80, graph=True, warnings=["once", "later"])
    assert gpu_decode._figures(64, one, short, long) == {
        "prefill_s": 0.2,
        "seconds_of_the_short_answer": 0.6,
        "seconds": 1.2,
        "seconds_of_each": [1.0, 1.4, 1.2],
        "tok_per_s": pytest.approx(64 / 0.6),
        "tokens": [7] * 80,
        "peak_reserved_bytes": 9,
        "backend": "triton",
        "graph": True,
        "warnings": ["once", "later"],
    }
    failed = Record("minilora", error="out of memory")
    assert gpu_decode._figures(64, one, failed, long) == {"error": "out of memory"}


def test_a_difference_within_the_jitter_is_no_rate() -> None:
    figures = gpu_decode._figures(64, answer(0.1, tokens=1), answer(0.5, 0.6, 0.9, tokens=16), answer(0.9, tokens=80))
    assert "tok_per_s" not in figures
    assert figures["error"] == "64 tokens more take 0.300 s more, and answers vary by 0.400 s"


def test_of_answers_that_begin_with_unlike_tokens_the_row_says_so() -> None:
    sides = [{"tokens": [first, 2, 3, 4][:n], "tok_per_s": 5.0} for first, n in ((1, 4), (1, 3), (7, 3))]
    ours, same, other = sides
    case = gpu_decode._case("decoding", dict(ours), same)
    assert (case["share_of_equal_tokens"], [line["what"] for line in case["rows"]]) == (1.0, ["decoding"])
    [line] = gpu_decode._case("decoding", dict(ours), other)["rows"]
    assert line["what"] == "decoding, but the answers begin with unlike tokens"


def test_a_result_says_whether_a_text_ended_with_a_graph() -> None:
    steps = object.__new__(gpu_models.ToldSteps)
    for graph in (object(), None):
        vars(steps).update(_graph=graph, _casts=[])
        steps.release()
        assert gpu_models.ToldSteps.had_graph == (graph is not None)


def test_figures() -> None:
    timings = {
        "minilora": Timing((4.0, 5.0, 6.0, 5.0, 50.0)),
        "slow": Timing((20.0,) * 5),
        "bitsandbytes": Timing((10.0,) * 5),
        "copy": Timing((2.5,) * 5),
    }
    case = report("an operation", timings, 5e6, 1e9, peers=("slow", "bitsandbytes", "not run"))
    assert case["timings"]["minilora"] == {"median_us": 5.0, "p20_us": 4.8, "p80_us": pytest.approx(14.8), "n": 5}
    assert case["gb_per_s"] == pytest.approx(1000)  # 5 MB in 5 us
    assert case["tflop_per_s"] == pytest.approx(200)
    assert case["speed_ratio"] == {"slow": 4.0, "bitsandbytes": 2.0, "copy": 0.5}
    [(line, _)] = rows_of(case)
    assert line == {"what": "an operation", "ours": "5.0 us", "peer": "10.0 us (bitsandbytes)", "ratio": "2.00"}
