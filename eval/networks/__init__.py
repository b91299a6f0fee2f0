"""Networks loaded for evaluation, from every layout of files that they are published in."""
