"""Tests of launch/benchmark."""
