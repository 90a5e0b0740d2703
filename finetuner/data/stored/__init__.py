"""Documents in files and databases: written, and read in place one at a time."""
