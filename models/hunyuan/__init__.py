"""HunyuanVideo-I2V as released: transformer, encoders, checkpoint layouts."""
