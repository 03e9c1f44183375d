"""Measures reading, training and caching against code outside this project."""
