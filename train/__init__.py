"""Train diffusion transformers and token decoders from a store."""
