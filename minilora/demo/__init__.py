"""The embedded demo: a tiny Mistral of our own, the data it grew on, and the story that fine-tunes it."""
