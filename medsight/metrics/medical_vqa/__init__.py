"""The metric's folder, as it is pushed to the Hub; `medsight.metrics.load("medical_vqa")` loads it."""
