"""Frozen towers: one file a library, and how they are loaded."""
