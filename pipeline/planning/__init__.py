"""Which units a run has: find files, probe them, cut clips, leave out known units, estimate the cost."""
