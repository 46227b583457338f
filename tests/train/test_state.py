"""Run state: what is saved is what is loaded, bit for bit, and nothing else is gone on from."""

import json
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import tiny_model
from torch import Tensor

from minilora.adamw import STATE, FlatAdamW
from minilora.checkpoint.safetensors_file import TensorEntry
from minilora.checkpoint.write import atomic_folder
from minilora.config import LoraConfig, Optimizer
from minilora.data.pack import RowSampler
from minilora.errors import UserError
from minilora.lora import add_lora
from minilora.train import state as state_module
from minilora.train.state import Counters, RunState, load_weights, read_document, refuse_other_run
from minilora.train.step import LossScale
from minilora.train.strategies import trainable

ORIGIN: dict[str, Any] = {
    "config": {"lora": {"rank": 2, "targets": ["q_proj"]}, "train": {"lr": 1e-3, "seed": 0}},
    "base": "abc",
    "data": {"train": "123"},
}
LENGTHS = [3, 9, 5, 7, 2, 8, 4]


def fresh(seed: int = 0, origin: dict[str, Any] = ORIGIN, kind: Optimizer = "adamw") -> RunState:
    torch.manual_seed(seed)
    weights = trainable(add_lora(tiny_model(), LoraConfig(rank=2, alpha=4)))
    optimizer = FlatAdamW({(0.01, 1.0): list(weights.values())}, kind=kind)
    return RunState(weights, optimizer, RowSampler(LENGTHS, 12, 0), LossScale.of(torch.float32), origin)


def advance(state: RunState, steps: int = 1) -> list[list[int]]:
    """Some steps on gradients that are drawn from torch's random state; the rows that were taken."""
    taken = []
    for _ in range(steps):
        taken += state.sampler.take(2)
        for p in state.weights.values():
            assert p.grad is not None
            p.grad.copy_(torch.randn_like(p))
        state.optimizer.step(1e-3)
    return taken


def assert_same(a: RunState, b: RunState) -> None:
    assert a.weights.keys() == b.weights.keys()
    assert a.optimizer.steps == b.optimizer.steps
    for name in a.weights:
        assert a.weights[name].equal(b.weights[name]), name
        moments_a, moments_b = a.optimizer.state[a.weights[name]], b.optimizer.state[b.weights[name]]
        assert moments_a.keys() == moments_b.keys() == STATE[a.optimizer.kind].keys()
        for key in moments_a:
            assert moments_a[key].equal(moments_b[key])
            assert moments_a[key].dtype == moments_b[key].dtype


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = fresh()
    advance(state, 3)
    state.counters = Counters(step=3, updates=2, best_loss=1 / 3, best_step=1, metrics_bytes=77)
    state.loss_scale = LossScale(True, scale=512.0, good_steps=4)
    state.save(tmp_path / "step-00000003")
    return tmp_path / "step-00000003"


@pytest.mark.parametrize("kind", STATE)
def test_round_trip_and_then_the_same_steps(tmp_path: Path, kind: Optimizer) -> None:
    straight = fresh(kind=kind)
    advance(straight, 3)
    straight.counters = Counters(3, 2, 100, 40, 1, 0.1 + 0.2, 2, 1, 77, 88)
    straight.loss_scale = LossScale(True, scale=512.0, good_steps=4)
    straight.save(tmp_path / "c")
    rows_of_straight = advance(straight, 5)

    resumed = fresh(seed=9, kind=kind)
    advance(resumed, 1)
    versions = resumed.load(tmp_path / "c")
    assert versions == state_module.versions()
    assert resumed.counters == straight.counters
    assert resumed.loss_scale == straight.loss_scale
    assert advance(resumed, 5) == rows_of_straight, "the data go on where they were"
    assert_same(straight, resumed)


@pytest.mark.parametrize("kind", STATE)
def test_before_the_first_update_there_are_no_moments(tmp_path: Path, kind: Optimizer) -> None:
    straight = fresh(kind=kind)
    straight.save(tmp_path / "c")
    advance(straight, 2)
    resumed = fresh(seed=9, kind=kind)
    advance(resumed, 1)
    resumed.load(tmp_path / "c")
    advance(resumed, 2)
    assert_same(straight, resumed)


def test_a_checkpoint_of_torch_s_own_optimizer_is_gone_on_from(tmp_path: Path) -> None:
    """Its moments have the same names and meaning, and a count of steps beside each."""
    straight = fresh()
    twins = {name: torch.nn.Parameter(p.detach().clone()) for name, p in straight.weights.items()}
    adam = torch.optim.AdamW(twins.values(), lr=1e-3, weight_decay=0.01, fused=True)
    for _ in range(3):
        for p in twins.values():
            p.grad = torch.randn_like(p)
        adam.step()
    saved = {f"weight.{name}": p.detach() for name, p in twins.items()} | {"rng.cpu": torch.get_rng_state()}
    saved |= {f"optimizer.{name}.{key}": t for name, p in twins.items() for key, t in adam.state[p].items()}
    straight.save(tmp_path / "c")
    document = (tmp_path / "c" / "state.json").read_text()
    with atomic_folder(tmp_path / "c", overwrite=True) as new:
        (new / "state.json").write_text(document)
        save_file(saved, new / "state.safetensors")
    resumed = fresh(seed=9)
    resumed.load(tmp_path / "c")
    assert resumed.optimizer.steps == 3
    for name, p in resumed.weights.items():
        assert p.equal(twins[name])
        assert all(moment.equal(adam.state[twins[name]][key]) for key, moment in resumed.optimizer.state[p].items())


def test_moments_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    """The key is named before (test_loop.py): it is among those that must stay. These are files that do not say so."""
    for kind, other in (("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")):
        state = fresh(kind=kind)
        advance(state)
        state.save(tmp_path / kind)
        with pytest.raises(UserError, match="is not as this run writes it"):
            fresh(kind=other).load(tmp_path / kind)


def test_what_is_saved_of_the_optimizer(saved: Path) -> None:
    names = {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq", "step") for name in fresh().weights}
    tensors = load_file(saved / "state.safetensors")
    kept = {key.removeprefix("optimizer."): t for key, t in tensors.items() if key.startswith("optimizer.")}
    assert {f"{key.rpartition('.')[2]}.{key.rpartition('.')[0]}" for key in kept} == names
    assert {float(t) for key, t in kept.items() if key.endswith(".step")} == {3.0}


def test_saving_changes_nothing(tmp_path: Path) -> None:
    once, never = fresh(), fresh()
    torch.manual_seed(1)
    advance(never, 2)
    torch.manual_seed(1)
    advance(once, 1)
    once.save(tmp_path / "c")
    advance(once, 1)
    assert_same(once, never)


def test_the_best_weights_alone(tmp_path: Path) -> None:
    state = fresh()
    advance(state, 2)
    best = {name: p.detach().clone() for name, p in state.weights.items()}
    state.save(tmp_path / "best", weights_only=True)
    advance(state, 2)
    load_weights(state.weights, tmp_path / "best")
    assert all(p.equal(best[name]) for name, p in state.weights.items())
    whole = fresh()
    advance(whole, 2)
    whole.save(tmp_path / "whole")
    sizes = [(tmp_path / name / "state.safetensors").stat().st_size for name in ("best", "whole")]
    assert sizes[0] < sizes[1] / 2


def test_a_checkpoint_is_read_a_tensor_at_a_time(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most, read = WeakSet[Tensor](), 0, TensorEntry.read

    def counted(entry: TensorEntry) -> Tensor:
        nonlocal most
        tensor = read(entry)
        if tensor.dtype == torch.float32 and tensor.numel() > 1:
            alive.add(tensor)
            most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(TensorEntry, "read", counted)
    state = fresh()
    state.load(saved)
    load_weights(state.weights, saved)
    assert most <= 2, "the one before is let go once there is a next"
    assert len(state.weights) > 4


def test_a_new_save_replaces_the_old_one(saved: Path) -> None:
    state = fresh()
    state.counters.step = 8
    state.save(saved)
    assert read_document(saved)["counters"]["step"] == 8
    assert [child.name for child in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("config", "lora", "rank"), 3, "config.lora.rank was 2 when the run began and is 3 now"),
        (("config", "lora", "targets"), ["q_proj", "k_proj"], r"config.lora.targets was \['q_proj'\]"),
        (("config", "train", "seed"), 1, "config.train.seed was 0"),
        (("config", "train", "lr"), 2e-3, "config.train.lr was 0.001"),
        (("base",), "xyz", "base was 'abc' when the run began and is 'xyz' now"),
        (("data", "train"), "999", "data.train was '123'"),
        (("data", "validation"), "1", "data.validation was None"),
        (("new",), "1", "new was None"),
    ],
)
def test_another_run_is_refused_by_the_key(saved: Path, path: tuple[str, ...], value: Any, named: str) -> None:
    origin = json.loads(json.dumps(ORIGIN))
    place = origin
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    state = fresh(origin=origin)
    before = {name: p.detach().clone() for name, p in state.weights.items()}
    with pytest.raises(UserError, match=named):
        state.load(saved)
    assert all(p.equal(before[name]) for name, p in state.weights.items())
    assert state.counters == Counters()


def test_a_key_that_is_gone_is_refused_too() -> None:
    with pytest.raises(UserError, match=r"a.b was 1 when the run began and is None now"):
        refuse_other_run({"a": {"b": 1}}, {"a": {}}, Path("c"))
    refuse_other_run({"a": {"b": [1, 2.0]}}, {"a": {"b": [1, 2.0]}}, Path("c"))


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "grown"])
def test_damage_is_refused(saved: Path, name: str, damage: str) -> None:
    file = saved / name
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes({"flip": data, "cut": data[:-1], "grown": file.read_bytes() + b" "}[damage])
    for load in (lambda: fresh().load(saved), lambda: load_weights(fresh().weights, saved)):
        with pytest.raises(UserError, match=name) as error:
            load()
        assert "manifest.json beside it" not in str(error.value), "without it there is no checkpoint at all"
    with pytest.raises(UserError, match="step-00000003 is damaged; delete it, and all of its step or later"):
        fresh().load(saved)


def resealed(saved: Path, document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """The checkpoint with other contents and a manifest that fits: of another version's, or of somebody's making."""
    with atomic_folder(saved, overwrite=True) as new:
        (new / "state.json").write_text(json.dumps(document))
        save_file(tensors, new / "state.safetensors")


WEIGHT = "layers.0.self_attn.q_proj.lora_A"


@pytest.mark.parametrize(
    ("part", "changes", "named"),
    [
        ("counters", {"step": -1}, "counters is .*which no run of this version writes"),
        ("counters", {"step": True}, "counters is"),
        ("counters", {"tokens": 2**60}, "counters is"),
        ("counters", {"best_loss": float("nan")}, "counters is"),
        ("counters", {"steps": 3}, "counters is"),
        ("loss_scale", {"enabled": "yes"}, "loss_scale is"),
        ("loss_scale", {"scale": float("inf")}, "loss_scale is"),
        ("sampler", {"epoch": "0"}, "sampler is"),
        ("sampler", {"row": 10_000}, "row 10000 of epoch 1 does not exist"),
        ("versions", {"threads": None}, "versions is"),
        ("origin", {"base": None}, "base was None when the run began"),
        ("tensors", {f"weight.{WEIGHT}": None}, f"{WEIGHT}' is not as this run writes it"),
        ("tensors", {f"weight.{WEIGHT}": torch.zeros(3, 3)}, f"{WEIGHT}' is not as"),
        ("tensors", {f"weight.{WEIGHT}": torch.zeros(2, 32).half()}, f"{WEIGHT}' is not as"),
        ("tensors", {f"weight.{WEIGHT}": torch.full((2, 32), torch.nan)}, f"{WEIGHT}: holds a number that is not"),
        ("tensors", {f"optimizer.{WEIGHT}.exp_avg": None}, f"{WEIGHT}.exp_avg' is not as"),
        ("tensors", {f"optimizer.{WEIGHT}.more": torch.zeros(1)}, f"{WEIGHT}.more' is not as"),
        ("tensors", {f"optimizer.{WEIGHT}.exp_avg_sq": torch.full((2, 32), -1.0)}, f"{WEIGHT}.exp_avg_sq is below 0"),
        ("tensors", {f"optimizer.{WEIGHT}.step": torch.tensor(-1.0)}, f"{WEIGHT}.step is below 0"),
        ("tensors", {"rng.cpu": None}, "rng.cpu' is not as"),
        ("tensors", {"rng.cpu": torch.full((5056,), 255, dtype=torch.uint8)}, "no random state of this torch"),
    ],
)
def test_what_no_run_has_written_is_refused(saved: Path, part: str, changes: dict[str, Any], named: str) -> None:
    document, tensors = read_document(saved), load_file(saved / "state.safetensors")
    if part == "tensors":
        tensors = {key: tensor for key, tensor in (tensors | changes).items() if tensor is not None}
    else:
        document[part] |= changes
    resealed(saved, document, tensors)
    state = fresh()
    before = {name: p.detach().clone() for name, p in state.weights.items()}
    with pytest.raises(UserError, match=named):
        state.load(saved)
    assert all(p.equal(before[name]) for name, p in state.weights.items())
    assert state.optimizer.steps == 0
    assert state.counters == Counters()


def test_weights_of_unlike_steps_are_refused(saved: Path) -> None:
    document, tensors = read_document(saved), load_file(saved / "state.safetensors")
    steps = [key for key in tensors if key.endswith(".step")]
    assert len(steps) > 1
    tensors[steps[-1]] += 1
    resealed(saved, document, tensors)
    state = fresh(1)
    before = {name: weight.detach().clone() for name, weight in state.weights.items()}
    with pytest.raises(UserError, match="have taken unlike numbers of steps"):
        state.load(saved)
    assert all(torch.equal(weight, before[name]) for name, weight in state.weights.items())


def test_parts_that_are_missing_or_no_objects(saved: Path) -> None:
    document, tensors = read_document(saved), load_file(saved / "state.safetensors")
    for part in ("counters", "loss_scale", "sampler", "versions", "origin"):
        for value in (None, [], 3):
            resealed(saved, {**document, part: value}, tensors)
            with pytest.raises(UserError, match=part if part != "origin" else "base was None"):
                fresh().load(saved)
    with atomic_folder(saved.with_name("step-00000004")) as new:
        (new / "state.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"state.json: not a readable JSON file: nested too deeply"):
        read_document(saved.with_name("step-00000004"))


def test_without_a_manifest_nothing_is_trusted(saved: Path) -> None:
    (saved / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest.json"):
        fresh().load(saved)


def test_a_newer_format_is_refused(saved: Path) -> None:
    document = json.loads((saved / "state.json").read_text()) | {"format": 2}
    tensors = (saved / "state.safetensors").read_bytes()
    with atomic_folder(saved, overwrite=True) as new:
        (new / "state.json").write_text(json.dumps(document))
        (new / "state.safetensors").write_bytes(tensors)
    with pytest.raises(UserError, match=r"state.json: format 2 is not 1, .* resume with the version"):
        fresh().load(saved)
    manifest = json.loads((saved / "manifest.json").read_text()) | {"format_version": 9}
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="format_version is 9"):
        fresh().load(saved)
