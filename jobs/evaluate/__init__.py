"""`python -m jobs.evaluate`: what methods of compression cost in quality, at equal KV; `readme` writes the table."""
