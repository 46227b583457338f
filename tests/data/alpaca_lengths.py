"""How alpaca_lengths.json was made: 6,000 sample lengths in tokens, drawn once. Run it from here to make it again.

Not Alpaca's own lengths, which are not ours to ship, but of their kind: log-normal, median 90, the logarithm's
standard deviation 0.65 (so a mean of about 111), at least 20 and at most 2,048 tokens, with one in a hundred five times
as long, as the essays and lists in such a set are.
"""

import json
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    random = np.random.default_rng(2023)
    lengths = 90 * np.exp(0.65 * random.standard_normal(6000))
    lengths *= np.where(random.random(6000) < 0.01, 5, 1)
    whole = np.clip(lengths.round(), 20, 2048).astype(int).tolist()
    Path(__file__).with_suffix(".json").write_text(json.dumps(whole) + "\n")
