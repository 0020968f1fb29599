"""The intercept's end: whose a response is, where we stand, where it is sent on to."""
