"""Stored features of frozen towers: read, written, computed."""
