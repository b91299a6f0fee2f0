"""Encode an image set once into a store of encoder tokens: the `pipeline` command."""
