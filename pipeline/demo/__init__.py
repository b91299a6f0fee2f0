"""The demo: real photographs in, a page to look at out; everything between is the user's own commands."""
