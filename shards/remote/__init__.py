"""Stores on servers: a path behind a URL, calls that may fail, rows asked for many at once, a cache on a local disk."""
