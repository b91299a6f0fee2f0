"""Training objectives: what one step computes."""
