"""The benchmark: the library's speed against this machine's matrix products and its peers."""
