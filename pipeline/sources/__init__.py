"""Where images come from: each kind of source lists its images once, and one reader gives their bytes."""
