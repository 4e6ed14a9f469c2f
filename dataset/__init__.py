"""Edit jobs, videos, the latent cache and batches; knows nothing of what a mask means."""
