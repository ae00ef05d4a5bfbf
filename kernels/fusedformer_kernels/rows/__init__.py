"""Kernels that compute rows by themselves: softmax, norms, activations, embeddings, losses."""
