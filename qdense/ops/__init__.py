"""The adapter's mathematics, independent of any model: tensors in, tensors out."""
