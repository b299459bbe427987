"""Files to batches: sources, the order in which samples are seen, decoding, transforms, tokens."""
