"""Scripts for the first minutes on a machine with one CUDA GPU: correctness first, then figures (README.md)."""
