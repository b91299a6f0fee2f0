"""Distances between image sets and between images, their feature networks and reference statistics."""
