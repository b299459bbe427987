"""Commands beside training: what they take, and what they do."""
