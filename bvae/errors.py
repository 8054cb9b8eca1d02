"""The one exception that a user's mistake or machine may cause."""


class UserError(Exception):
    """An error the user can mend. Its text is one clear line; command lines print it to stderr and exit with 2."""
