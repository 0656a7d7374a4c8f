"""Runs of a model over batches of prompts: the data set, the passes, and the one loop that measures them."""
