"""Where bytes lie: a folder or a server. Listing, reading ranges, publishing atomically, caching."""
