"""Turns the results of a run into documents: JSON first, everything else from that JSON."""
