"""`python -m jobs.measure.benchmark --suite engine`: long videos, and many answers at once.

Runs the embedded model on a CPU, random weights in a real model's shape on a GPU. Unlike the other suites it needs the
pipeline and must run alone.
"""
