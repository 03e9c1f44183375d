"""Compiles a config's programs for devices that are not there."""
