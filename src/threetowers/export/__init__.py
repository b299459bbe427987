"""Trained pairs in the formats of other libraries."""
