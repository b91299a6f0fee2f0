"""Image files wherever they lie: finding them in folders, tars and tables, and reading their bytes."""
