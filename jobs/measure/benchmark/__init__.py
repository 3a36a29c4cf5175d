"""`python -m jobs.measure.benchmark`: the time that compression costs and saves; `readme` writes the tables."""
