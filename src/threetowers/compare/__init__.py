"""The comparison of several methods on equal terms: runs, figures, claims, examples."""
