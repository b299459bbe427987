"""Formats of images with captions or labels that lie as files; one file a format."""
