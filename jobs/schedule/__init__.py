"""`python -m jobs.schedule`: captions what is new by a cron expression, on a Ray cluster without Kubernetes."""
