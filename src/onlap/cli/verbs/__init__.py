"""The verbs: for each, ``NAME_arguments(parser)`` declares its arguments and ``NAME(call)`` runs it."""
