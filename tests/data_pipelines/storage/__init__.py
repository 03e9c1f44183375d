"""Tests of data_pipelines/storage."""
