"""Training of MedSIGHT: data, stages and the scripts that run them."""
