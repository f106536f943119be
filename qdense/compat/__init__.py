"""What qdense relies on in other libraries beyond what they document: one module for each library.

Everything here has its reason, says what breaks without it, and has a test in tests/compat that it is still there and still
does what is relied on: so an upgrade that changes it fails there, in words. Nothing else in the package uses private names of
another library (tests/compat/test_private_names.py).
"""
