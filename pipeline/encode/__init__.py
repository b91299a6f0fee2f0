"""Encoding: plan, preflight, shard leases, decode and write threads, finish."""
