"""What has a built-in name: models, data sets."""
