"""Files: atomic writes, checksummed JSON and tensors, tables read by memory map, the cache directory."""
