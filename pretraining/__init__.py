"""Trains the tiny Wan2.1-I2V again from nothing: scenes, VAE, encoders, transformer, export."""
