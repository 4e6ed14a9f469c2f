"""Training of a LoRA on one edit."""
