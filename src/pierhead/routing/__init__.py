"""Where a request goes and when: balancing, queues, health and splits; pure decisions without sockets or clocks."""
