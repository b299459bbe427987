"""What a trained model is worth: retrieval, zero-shot classification, the convex combination."""
