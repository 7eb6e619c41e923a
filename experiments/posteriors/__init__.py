"""The binary `experiments.posteriors`: flows beside NUTS on a dozen posteriors."""
