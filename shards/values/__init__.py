"""What a stored number means: storage types, int8 codes, exact moments. Pure arithmetic."""
