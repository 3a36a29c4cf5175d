"""`python -m jobs.measure.benchmark --suite engine`: long videos, many answers at once, on the embedded model or, on a
GPU, on random weights in a real model's shape. Unlike the other suites it needs the pipeline, and runs by itself.
"""
