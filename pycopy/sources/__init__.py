"""Where captured segments come from."""
