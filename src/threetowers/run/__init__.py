"""A configuration made real, its frozen towers at run time, and a finished run on disk."""
