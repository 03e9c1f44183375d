"""Tests of data_pipelines/datasets."""
