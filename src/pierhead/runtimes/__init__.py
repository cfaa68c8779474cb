"""Where engines run: sandboxed processes and containers."""
