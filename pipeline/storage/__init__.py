"""Lists, reads and writes files on local disk and S3, with one error type for both."""
