"""Speed and memory scripts and their committed results; never part of the tests."""
