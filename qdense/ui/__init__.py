"""Everything drawn in the terminal; nothing else in the package draws.

State is kept apart from drawing: a display takes events and gives rich renderables, a table takes a finished result. On a
terminal a display is live; in a pipe or a CI log it is plain lines, some seconds apart. Console and clock can be given, so all
of it can be tested.
"""
