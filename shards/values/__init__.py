"""What a stored number stands for: storage types, int8 codes, exact moments. Pure arithmetic."""
