"""The content-addressed OCI image layout on this host."""
