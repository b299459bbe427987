"""The evaluation of trained models: retrieval, convex combination, zero-shot classification."""
