"""Everything drawn in the terminal; nothing else in the package draws.

State is separate from drawing: a display turns events into rich renderables, a table takes a finished result. On a
terminal a display is live; in a pipe or a CI log it prints plain lines every few seconds. Console and clock
can be passed in for tests.
"""
