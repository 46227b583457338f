"""The one exception for what a user can mend: a message of one line that says what, where, why, and what to do."""


class UserError(Exception):
    """Bad input, found by us and explained in one line. The command line prints it and exits with status 1."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
