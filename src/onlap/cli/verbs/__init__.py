"""The verbs: ``arguments(parser)`` declares what one takes, ``run(call)`` does it."""
