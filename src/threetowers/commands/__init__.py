"""Commands that look and tell, and train nothing."""
