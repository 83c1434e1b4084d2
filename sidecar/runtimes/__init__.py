"""Runtimes: one artifact variant loaded on one device, patches in and embeddings out."""
