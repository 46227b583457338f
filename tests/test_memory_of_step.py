"""What a step takes: parts of the prediction by hand; whole steps are in tests/benchmarks/test_ledger.py."""

from dataclasses import replace

import pytest
import torch
from tiny_runs import TINY
from torch import Tensor

from benchmarks.ledger import random_model
from minilora import projections
from minilora.config import MISTRAL_7B, LoraConfig
from minilora.fused import Keep
from minilora.lora import add_lora
from minilora.memory_of_step import StepPlan
from minilora.projections import Projections


def test_a_gpu_s_loss_by_hand() -> None:
    """64 MiB of logits, of which nothing else is made; the last block's output and the norm's in 16 bits, and
    h's gradient, which backward makes anew, scaled. A head that learns: its gradient too, and in 16 bits the head,
    and h without what is no target."""
    of = {"rows": 4, "length": 1024, "targets": 10, "device": torch.device("cuda")}
    h, v = 4096 * 4096, 32768 * 4096
    plan = StepPlan(MISTRAL_7B, torch.bfloat16, True, LoraConfig(rank=16), **of)
    assert plan.loss_bytes() == {"residual stream": 2 * h, "final hidden": 2 * h, "logits": (64 << 20) + 2 * h}
    plan = StepPlan(MISTRAL_7B, torch.bfloat16, True, LoraConfig(rank=16, modules_to_save=("lm_head",)), **of)
    in_work = (64 << 20) + 1024 * 4096 * 2 + 2 * v
    logits = max(in_work, 4 * v + 2 * h) + 4 * v + 2 * h
    assert plan.loss_bytes() == {"residual stream": 2 * h, "final hidden": 2 * h, "logits": logits}
    plan = StepPlan(MISTRAL_7B, torch.float32, None, None, **of)
    assert plan.loss_bytes()["logits"] == max((64 << 20) + 512 * 4096 * 4, 4 * v + 4 * h) + 4 * v + 4 * h


@pytest.mark.parametrize("rank", [8, 16])
def test_kept_weights_have_what_the_adapters_join_to_them(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, for ranks that 16 divides; not counted is the corner between B's columns and A's rows."""
    monkeypatch.setattr(projections, "has_kernels", lambda _: True)
    model = add_lora(random_model(TINY, torch.float32), LoraConfig(rank=rank))
    attention, mlp = model.layers[0].self_attn, model.layers[0].mlp
    groups = [
        Projections.of(attention.q_proj, attention.k_proj, attention.v_proj, carrier=1),
        Projections.of(attention.o_proj),
        Projections.of(mlp.gate_proj, mlp.up_proj),
        Projections.of(mlp.down_proj),
    ]
    decoded = [weight for group in groups for weight in group.decoded(torch.float32).weights]
    assert all(isinstance(weight, Tensor) for weight in decoded)
    n_bytes = sum(weight.untyped_storage().nbytes() for weight in decoded if isinstance(weight, Tensor))
    gpu, keep = torch.device("cuda"), (Keep.WEIGHTS,) * TINY.n_layers
    plan = StepPlan(TINY, torch.float32, True, LoraConfig(rank=rank), 1, 8, device=gpu, keep=keep)
    corners = 4 * 7 * rank * rank if rank == 16 else 0
    assert plan.kept_bytes(0, plan.block_bytes())["decoded weights"] == n_bytes - corners


def test_a_gpu_s_mlp_by_hand() -> None:
    """dh and the decoded weight beside gate and up, which are kept, or made again; what else backward has of them lies
    where they were. Two gradients of x, and norm(x) with the second."""
    plan = StepPlan(MISTRAL_7B, torch.bfloat16, True, LoraConfig(rank=16), 1, 2048, device=torch.device("cuda"))
    x, gate, weight = 2 * 2048 * 4096, 2 * 2048 * 14336, 2 * 4096 * 14336
    assert plan.scratch_bytes(makes_gates=False) == x + max(gate + weight, gate + x + weight)
    assert plan.scratch_bytes(makes_gates=True) == x + max(3 * gate + weight, 2 * gate + x + weight)


def test_a_gpu_s_attention_by_hand() -> None:
    """16 x 512 tokens in 511 runs: two gradients of x, those of the heads, k's and v's for each query head, and
    FlashAttention's 129 numbers a row and head, with 128 rows behind each run. Without GQA, those of k and v are these.
    The MLP's backward takes less."""
    gpu, lora = torch.device("cuda"), LoraConfig(rank=16)
    plan = StepPlan(MISTRAL_7B, torch.bfloat16, True, lora, 16, 512, device=gpu, runs=511)
    x = q = 2 * 8192 * 4096
    flash = 1_215_283_200
    assert flash == 4 * 32 * (8192 + 511 * 128) * 129
    assert plan.attention_scratch_bytes() == 2 * x + 2 * (q + q // 4) + 2 * q + flash == 1_651_490_816
    alike = replace(plan, config=replace(MISTRAL_7B, n_kv_heads=32), runs=0)
    assert alike.attention_scratch_bytes() == 2 * x + 4 * q + 4 * 32 * (8192 + 16 * 128) * 129
    of_copies = 2 * plan.learns.n
    assert plan.predict()["scratch"] == of_copies + plan.attention_scratch_bytes()


def test_under_a_mask_on_a_gpu_k_and_v_are_kept_as_repeated() -> None:
    """The fast block, whose tape has them, keeps them as they were, too; without GQA they are one."""
    gpu = torch.device("cuda")
    fast = StepPlan(MISTRAL_7B, torch.float32, True, LoraConfig(rank=16), 1, 8, sees="mask", device=gpu)
    rest = 4 * (2 * 8 * 4096 + 8 * 8 + 8 * 32)  # q and what comes out; the mask; logsumexp
    assert fast.block_bytes()["attention"] == rest + 4 * 2 * 8 * (4096 + 1024)
    plain = replace(fast, adapter=LoraConfig(rank=16, dropout=0.1))
    assert plain.block_bytes()["attention"] == rest + 4 * 2 * 8 * 4096
    for plan in (fast, plain):
        alike = replace(plan, config=replace(MISTRAL_7B, n_kv_heads=32))
        assert alike.block_bytes()["attention"] == rest + 4 * 2 * 8 * 4096


@pytest.mark.parametrize("head_dim", [80, 160])
def test_flash_attention_rounds_heads_up(head_dim: int) -> None:
    """To a multiple of 32; above 128, of 64."""
    sizes, gpu = replace(MISTRAL_7B, head_dim=head_dim), torch.device("cuda")
    plan = StepPlan(sizes, torch.bfloat16, True, LoraConfig(rank=16), 1, 512, device=gpu, runs=2)
    more = replace(plan, runs=3).attention_scratch_bytes() - plan.attention_scratch_bytes()
    assert more == 4 * 32 * 128 * ({80: 96, 160: 192}[head_dim] + 1)
