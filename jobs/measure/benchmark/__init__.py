"""`python -m jobs.measure.benchmark`: what compression costs and saves in time; `readme` writes the tables."""
