"""Measurements against the libraries that people use today. They need the extra `bench`, and run from the checkout.

python -m benchmarks.train_step     a whole QLoRA step against transformers + peft + bitsandbytes
python -m benchmarks.nf4_cpu        NF4 against bitsandbytes' CPU code
python -m benchmarks.compare        the strategies on the embedded base, with and without replay
python -m benchmarks.demo_base.pretrain OUT_DIR   how that base was made
python -m benchmarks.profile_step   where the seconds of our step go
python -m benchmarks.make_checkpoint --shape mistral-7b-v0.3 --layout hf OUT
python -m benchmarks.merge          memory and time of merging a 7B, audit included
python -m benchmarks.table          docs/measured.md and the README's "Measured" from results/*.json
"""
