"""The training loop and what it needs: feed, state, checkpoints, averages, schedule, processes, signals."""
