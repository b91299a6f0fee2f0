"""Image files wherever they are: finding them in folders, tars and tables, and reading their bytes."""
