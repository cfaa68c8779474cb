"""OCI distribution: where artifacts are pushed to and pulled from."""
