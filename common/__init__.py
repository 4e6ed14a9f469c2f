"""What every room may import and what imports nothing of ours: errors, files, settings, progress."""
