"""Frozen encoders: families, weights, preprocessing."""
