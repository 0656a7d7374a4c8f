"""The built-in engines other than freeze_core: hooks by hand, and what peers' libraries express."""
