"""Checkpoints from other files: published weights, pretrained parts."""
