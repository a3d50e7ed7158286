"""Files: atomic writes, checksummed JSON and tensors, memory-mapped tables, the cache directory."""
