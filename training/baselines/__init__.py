"""Systems that the model is held against, trained on the same rows."""
