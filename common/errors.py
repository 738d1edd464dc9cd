"""Errors that a user can act on."""


class FourfoldError(ValueError):
    """Bad input: the message names the value, what was expected and the fix.

    The command line prints the message alone and exits with status 2.
    """
