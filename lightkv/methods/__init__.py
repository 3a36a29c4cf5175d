"""The compression methods, their table and their configuration: which tokens a stage merges or drops."""
