"""Plans the units of a run: finds files, probes them, cuts clips, skips known units, estimates the cost."""
