"""What a model can do, measured: perplexity, answers and their metrics, what it forgot, how far it is from another."""
