"""The storage formats: one protocol, a module a format."""
