"""What a model can do, measured: perplexity, answers to prompts, and the distance between two models."""
