"""Measurements against the libraries that people use today. They need the extra `bench`, and run from the checkout.

python -m benchmarks.gpu             all that needs a GPU: kernels, a step and decoding of the 7B; --only norm or so
python -m benchmarks.calibrate       from how many rows on which kernel is faster: minilora/dispatch.json
python -m benchmarks.sass            instructions a weight in machine code, against bitsandbytes' binary; no GPU needed
python -m benchmarks.train_step      a whole QLoRA step against transformers + peft + bitsandbytes, on a CPU
python -m benchmarks.nf4_cpu         NF4 against bitsandbytes' CPU code
python -m benchmarks.load            quantizing and loading against transformers + bitsandbytes
python -m benchmarks.merge           memory and time of merging a 7B, audit included
python -m benchmarks.ledger          the ledger against what a step takes, owner by owner
python -m benchmarks.profile_step    where the seconds of our step go
python -m benchmarks.scaling         whether time and memory grow as they should
python -m benchmarks.count_step      launches, bytes and FLOPs of a step on a GPU, counted
python -m benchmarks.compare         the strategies on the embedded base, with and without replay
python -m benchmarks.optimizer_state AdamW in 32 and 8 bits on the embedded base
python -m benchmarks.fuzz            every reader under spoilt files
python -m benchmarks.demo_base.pretrain OUT_DIR   how the embedded base was made
python -m benchmarks.make_checkpoint --shape mistral-7b-v0.3 --layout hf OUT   a random one of any size
python -m benchmarks.plot            the roofline
python -m benchmarks.table           docs/measured.md and the README's "Measured" from results/*.json
"""
