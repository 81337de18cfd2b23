"""The metric's folder, as it is pushed to the Hub; `medsight.metrics.load("mask_dice")` loads it."""
