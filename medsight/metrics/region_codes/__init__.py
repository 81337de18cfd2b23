"""The metric's folder, as it is pushed to the Hub; `medsight.metrics.load("region_codes")` loads it."""
