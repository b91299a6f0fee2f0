"""Generate, reconstruct and score: everything that uses trained snapshots."""
