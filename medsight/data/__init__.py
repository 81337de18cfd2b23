"""Training data: readers of the field's layouts, checks, augmentation, region codes for masks, batches."""
