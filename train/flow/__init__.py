"""The flow from noise to data: path, integrators, guidance. t = 0 is data."""
