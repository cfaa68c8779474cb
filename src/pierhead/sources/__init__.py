"""Where references are fetched from, one file per source."""
