"""A process beside the gateway that writes access log and recordings and exports traces, off the event loop's core."""
