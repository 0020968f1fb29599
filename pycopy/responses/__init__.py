"""Where the target's responses come from: this host, an intercept elsewhere, or datagrams."""
