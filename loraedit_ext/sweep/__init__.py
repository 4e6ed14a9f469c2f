"""Many trials of one or several edits."""
