"""I2V models as released: transformers, checkpoints, pipeline layers."""
