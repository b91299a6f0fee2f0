"""The store of encoder tokens: its format, its reader, its order and its loader."""
