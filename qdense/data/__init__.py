"""Training and test data: where it comes from, how it is checked, how a row becomes tokens."""
