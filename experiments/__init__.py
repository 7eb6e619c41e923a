"""Experiments: absl binaries over led_jax."""
