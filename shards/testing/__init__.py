"""The behaviour suite that every storage format passes, and readers of other libraries to compare with."""
