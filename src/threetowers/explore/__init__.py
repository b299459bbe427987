"""A local page to explore finished runs: search, zero-shot classes, similarities, maps of embeddings, live curves."""
