"""Seeded checkpoints in the shape of jina-embeddings-v3 and v5, for tests and trials."""
