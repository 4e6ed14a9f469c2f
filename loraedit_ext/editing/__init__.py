"""An edit with a trained LoRA: from noise to a result that a person can use."""
