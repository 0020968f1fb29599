"""Bytes as they are on the wire: headers, sequence numbers, addresses."""
