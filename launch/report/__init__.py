"""Reads finished and running runs, and shows them in a table."""
