"""A seeded checkpoint in the shape of jina-embeddings-v3, for tests and trials."""
