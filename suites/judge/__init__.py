"""Instruments: what a model's attention is made of, what a pass consumed, what it should have been."""
