"""Configuration of every subcommand."""
