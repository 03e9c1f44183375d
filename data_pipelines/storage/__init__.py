"""Writes and resumes prepared data: shards, locks, TFDS's format, copies on local disks."""
