"""`python -m jobs.schedule`: caption new videos by a cron expression, on a Ray cluster without Kubernetes."""
