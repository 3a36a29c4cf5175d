"""Files on a disk or in S3: list, read, write, and the errors of both."""
