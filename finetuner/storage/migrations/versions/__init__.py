"""One file a version of the tables, in order of their numbers."""
