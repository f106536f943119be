"""Undocumented behaviour of other libraries that qdense relies on: one module for each library.

Everything here states its reason and what breaks without it. A test in tests/compat checks that it still behaves as
expected, so an incompatible upgrade fails there with an explanation. No other code in the package uses private names
of another library (tests/compat/test_private_names.py).
"""
