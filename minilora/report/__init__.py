"""What a person looks at: a block and a layer in numbers (explain), data, a run's plots and page, runs compared."""
