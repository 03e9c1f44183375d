"""Reads and writes the formats that weights come in."""
