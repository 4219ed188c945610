"""The cache: fingerprints of what a result depends on, and files that are safe to share and to read."""
