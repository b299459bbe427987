"""Tar shards: found, indexed, read by offset, written."""
