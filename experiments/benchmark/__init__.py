"""The benchmark: speed of the library beside this machine's matrix products and its peers."""
