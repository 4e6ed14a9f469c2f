"""Wan2.1-I2V as released."""
