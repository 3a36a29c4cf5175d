"""The output folder of a run: its files, lock, summary, samples, retries and report page."""
