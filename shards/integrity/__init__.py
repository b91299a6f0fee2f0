"""Checking every byte, naming damage, removing damaged shards."""
