"""Image sets to evaluate, and files of samples."""
