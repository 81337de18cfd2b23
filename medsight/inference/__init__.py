"""Answers about images and scans, and what is written of them."""
