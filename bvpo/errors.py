"""The one exception that a command turns into a message without a traceback."""


class UserError(ValueError):
    """Something that the user can mend: says what was found, where, and what to do.

    Any other exception is a defect of this package and keeps its traceback.
    """
