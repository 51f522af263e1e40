"""Buckets, and every other place that fsspec can write: publishing to a URL."""
