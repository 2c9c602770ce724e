"""Whole runs on one local Ray cluster; a package, because its files are named like the unit tests above it."""
