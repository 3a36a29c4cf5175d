"""`python -m jobs.measure.evaluate`: what compression costs in quality, at equal KV; `readme` writes the tables."""
