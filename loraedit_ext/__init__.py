"""LoRA-Edit: what a mask means, how a regime builds a sample, and the engine around it."""
