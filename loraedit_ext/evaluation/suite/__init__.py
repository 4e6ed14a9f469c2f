"""The benchmark: edits of procedural scenes whose truth is known."""
