"""What is known by name: models, data sets."""
