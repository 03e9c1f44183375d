"""Tests of data_pipelines/modalities."""
