"""Weights on disk: snapshots, published files, safetensors."""
