"""Who takes which shard: each engine starts workers somewhere; the commit records decide everything else."""
