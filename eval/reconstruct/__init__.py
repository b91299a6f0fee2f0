"""Decoding stored tokens, and comparing with the images they came from."""
