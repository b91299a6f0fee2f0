"""The networks: diffusion transformers, the token decoder, and the parts they share."""
