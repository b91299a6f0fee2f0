"""What a run writes about itself: metrics, curves, the run page."""
