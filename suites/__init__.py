"""The suites that judge an engine: claims, the instruments that see them, and the tests that run them.

A check is a plain function, `check_<claim>(engine, model, ...)`, in the module of its subject (`values`, `gradients`,
...); it needs no pytest and can be called in a notebook. `test_<subject>.py` runs the checks on drawn examples. The
instruments are in `judge`: they look at an engine from outside alone and share no code with `freeze_core`.
"""
