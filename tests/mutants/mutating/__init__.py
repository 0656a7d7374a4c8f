"""Mutation testing of freeze_core: one small change at a time, and which test notices."""
