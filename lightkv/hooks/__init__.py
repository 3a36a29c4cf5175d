"""Compresses inside stock `generate`: layer hooks, attention to merged tokens, the short cache, the report."""
