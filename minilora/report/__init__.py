"""What a person looks at: a block and a layer in numbers (explain), a run's plots, and its page."""
