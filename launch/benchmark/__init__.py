"""Measures reading, training and caching beside something outside this project."""
