"""Configuration: dataclasses, presets, command line."""
