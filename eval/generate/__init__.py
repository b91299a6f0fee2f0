"""Sampling images from a generator, and scoring them."""
