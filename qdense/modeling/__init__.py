"""The frozen base model and the adapter on it: find, prepare, quantize, load, recognise, attach, save."""
