"""Tests of data_pipelines/demo_corpus."""
