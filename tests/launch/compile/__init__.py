"""Tests of launch/compile."""
