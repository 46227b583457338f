"""How the demo's base was made: `python -m benchmarks.demo_base.pretrain OUT_DIR` (about 45 minutes on two cores).

    texts of prepare.py -> random weights -> our own loop on raw text, every weight learning -> bfloat16 in OUT_DIR/base

OUT_DIR/run is the run folder; started again with --resume, it goes on from its last checkpoint. What the script made
was copied to `minilora/demo/base/`, its record to `benchmarks/results/demo_pretrain.json`.
"""

import sys
from pathlib import Path

import torch

from benchmarks.demo_base.prepare import prepare
from minilora.checkpoint.load import load_model
from minilora.checkpoint.save import save_hf
from minilora.config import BaseConfig, DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from minilora.model import Mistral
from minilora.report.console import Console
from minilora.tokenizer import load_tokenizer
from minilora.train.loop import fine_tune
from minilora.train.progress import ConsoleReporter

MODEL = ModelConfig(
    dim=256, n_layers=5, head_dim=32, hidden_dim=640, n_heads=8, n_kv_heads=2, vocab_size=458, sliding_window=16
)
SEED = 0


def pretrain(out: Path, resume: bool) -> None:
    """Make the base in out/base."""
    if not resume:
        prepare(out / "texts")
    tokenizer = load_tokenizer(out / "texts" / "tokenizer.model")
    if not resume:
        model = Mistral(MODEL)
        model.init_weights(SEED)
        save_hf(model, out / "random", dtype=torch.float32, tokenizer=tokenizer.path, overwrite=True)
    config = RunConfig(
        model=BaseConfig(path=str(out / "random")),
        data=DataConfig(str(out / "texts/pretrain.jsonl"), str(out / "texts/heldout.jsonl"), max_seq_len=128),
        train=TrainConfig(
            output=str(out / "run"), strategy="full", seed=SEED, max_steps=5000, batch_size=16, lr=3e-3,
            warmup_steps=100, min_lr_ratio=0.01, weight_decay=0.1, beta2=0.95, checkpoint_every=250,
        ),
        eval=EvalConfig(every=250, batch_size=16),
    )  # fmt: skip
    fine_tune(config, ConsoleReporter(Console()), resume, overwrite=not resume)
    trained = load_model(out / "run" / "model", dtype=torch.float32)
    save_hf(trained, out / "base", dtype=torch.bfloat16, tokenizer=tokenizer.path, overwrite=True)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[2:] not in ([], ["--resume"]):
        sys.exit("usage: python -m benchmarks.demo_base.pretrain OUT_DIR [--resume]")
    pretrain(Path(sys.argv[1]), "--resume" in sys.argv)
