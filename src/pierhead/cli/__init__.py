"""The `pier` command: one file per verb group."""
