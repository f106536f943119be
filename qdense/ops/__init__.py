"""The adapter's mathematics, apart from any model: tensors in, tensors out."""
