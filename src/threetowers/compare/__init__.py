"""Several methods on equal terms: runs, figures, claims, and what people look at."""
