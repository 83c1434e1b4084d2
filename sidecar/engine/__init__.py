"""The engine: which item runs where and when. Knows patches and embeddings, nothing of gRPC."""
