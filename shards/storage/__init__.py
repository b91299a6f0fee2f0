"""Where bytes are: a folder or a server. Listing, reading ranges, publishing atomically, caching."""
