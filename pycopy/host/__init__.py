"""This host, which is only looked at: devices, routes, neighbours, ports."""
