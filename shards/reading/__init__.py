"""Reading a finished store: rows, shuffled order, batches."""
