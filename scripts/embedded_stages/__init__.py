"""The stages of `build_embedded.py`, one a file, and what they share."""
