"""Reads finished and unfinished runs, and shows them in a table."""
