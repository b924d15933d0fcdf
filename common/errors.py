"""The one exception that a user sees as a line instead of a traceback."""


class UserError(Exception):
    """One line for the user: what was wrong, where, and what to do."""
