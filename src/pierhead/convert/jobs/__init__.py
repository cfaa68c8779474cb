"""Programs that run inside those environments; each knows only the standard library and its own packages."""
