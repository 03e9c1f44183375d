"""Compiles the programs of a config for a topology without its devices."""
