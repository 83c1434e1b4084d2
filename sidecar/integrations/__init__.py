"""How others take their embeddings from a sidecar: what speaks their formats, on the client's side of the contract."""
