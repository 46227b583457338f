"""How the demo's base and its data were made: the dictionary, the texts and the tokenizer, the pretraining."""
