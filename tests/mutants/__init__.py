"""Single changes of the rules in C, and whether a test notices each: see __main__.py."""
